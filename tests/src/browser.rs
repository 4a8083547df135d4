//! Chromium without a window, over the DevTools protocol (<https://chromedevtools.github.io/devtools-protocol/>) on a pipe.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Time limit of a command.
const LIMIT: Duration = Duration::from_secs(30);

/// Chromium with one tab.
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    /// Number of the last command.
    last: u64,
    session: Option<String>,
    /// What Chromium reported without being asked.
    events: Vec<Value>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts Chromium.
    ///
    /// # Panics
    /// If Chromium is not installed.
    #[must_use]
    pub fn start() -> Self {
        let profile = tempfile::tempdir().expect("a folder");
        // Chromium reads commands from descriptor 3, and writes to 4. Its sandbox needs another user than root.
        let script = "exec chromium --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars \
                      --no-first-run --disable-background-networking --disable-component-update --disable-sync \
                      --remote-debugging-pipe --user-data-dir=\"$1\" about:blank 3<&0 4>&1 </dev/null >/dev/null 2>&1";
        let mut child = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(profile.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let (sender, messages) = channel();
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        thread::spawn(move || {
            let mut message = Vec::new();
            while output.read_until(0, &mut message).is_ok_and(|length| length > 0) {
                message.pop();
                let sent = serde_json::from_slice(&message).map(|message| sender.send(message));
                if !matches!(sent, Ok(Ok(()))) {
                    return;
                }
                message.clear();
            }
        });
        let commands = child.stdin.take().expect("a pipe");
        let mut browser =
            Self { child, commands, messages, last: 0, session: None, events: Vec::new(), _profile: profile };
        let targets = browser.call("Target.getTargets", &json!({}));
        let targets = targets["targetInfos"].as_array().expect("targets");
        let tab = targets.iter().find(|target| target["type"] == "page").expect("a tab")["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", &json!({ "targetId": tab, "flatten": true }));
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        browser
    }

    /// Sends a command, and returns its result.
    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.last += 1;
        let mut command = json!({ "id": self.last, "method": method, "params": params });
        if let Some(session) = &self.session {
            command["sessionId"] = json!(session);
        }
        let mut bytes = command.to_string().into_bytes();
        bytes.push(0);
        self.commands.write_all(&bytes).and_then(|()| self.commands.flush()).expect("Chromium runs");
        let until = Instant::now() + LIMIT;
        loop {
            match self.messages.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(message) if message["id"] == self.last => {
                    assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                    return message["result"].clone();
                }
                Ok(message) => self.events.push(message),
                Err(RecvTimeoutError::Timeout) => panic!("Chromium does not answer {method}"),
                Err(RecvTimeoutError::Disconnected) => panic!("Chromium has ended: is the package chromium installed?"),
            }
        }
    }

    /// Sets the size of the window, and the number of pixels of a unit. `phone`: as a phone has it.
    pub fn resize(&mut self, width: u32, height: u32, scale: f64, phone: bool) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone });
        self.call("Emulation.setDeviceMetricsOverride", &metrics);
    }

    /// Sets the preferred colours: `light` or `dark`.
    pub fn prefer(&mut self, scheme: &str) {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.call("Emulation.setEmulatedMedia", &json!({ "features": [feature] }));
    }

    /// Opens an address, and waits until the page is complete.
    pub fn open(&mut self, url: &str) {
        let opened = self.call("Page.navigate", &json!({ "url": url }));
        assert!(opened["errorText"].is_null(), "{url}: {}", opened["errorText"]);
        self.wait_for("document.readyState === 'complete'", Duration::from_secs(20));
    }

    /// Returns the value of an expression.
    pub fn eval(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let result = self.call("Runtime.evaluate", &params);
        assert!(result["exceptionDetails"].is_null(), "{expression}: {}", result["exceptionDetails"]);
        result["result"]["value"].clone()
    }

    /// Returns the text of the first element that a selector matches; empty if there is none.
    pub fn text(&mut self, selector: &str) -> String {
        let expression = format!("(document.querySelector({}) || {{ innerText: '' }}).innerText", json!(selector));
        self.eval(&expression).as_str().unwrap_or_default().to_owned()
    }

    /// Waits until an expression is true. Returns the time that it took.
    ///
    /// # Panics
    /// If the limit is over. The message has the page's text.
    #[track_caller]
    pub fn wait_for(&mut self, expression: &str, limit: Duration) -> Duration {
        let begun = Instant::now();
        // A page that is just loading may lack the element of the expression.
        let condition = format!("(() => {{ try {{ return Boolean({expression}); }} catch {{ return false; }} }})()");
        while self.eval(&condition) != json!(true) {
            if begun.elapsed() >= limit {
                let text = self.eval("document.body ? document.body.innerText : ''");
                panic!("not within {limit:?}: {expression}\n{}", text.as_str().unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(50));
        }
        begun.elapsed()
    }

    /// Writes what the window shows as a PNG file.
    pub fn screenshot(&mut self, path: &Path) {
        let picture = self.call("Page.captureScreenshot", &json!({ "format": "png" }));
        let bytes = fleet::encoding::decode(picture["data"].as_str().expect("a picture")).expect("base64");
        std::fs::write(path, bytes).expect("a folder");
    }

    /// Returns and forgets everything that the console would show: errors, warnings and exceptions.
    pub fn problems(&mut self) -> Vec<String> {
        self.eval("1");
        let is_problem = |event: &Value| match event["method"].as_str().unwrap_or_default() {
            "Runtime.exceptionThrown" | "Log.entryAdded" => true,
            "Runtime.consoleAPICalled" => event["params"]["type"] != "log",
            _ => false,
        };
        let problems = self.events.iter().filter(|event| is_problem(event)).map(|event| event["params"].to_string());
        let problems = problems.collect();
        self.events.retain(|event| !is_problem(event));
        problems
    }

    /// Returns the address of each request so far.
    pub fn requests(&mut self) -> Vec<String> {
        self.eval("1");
        let sent = self.events.iter().filter(|event| event["method"] == "Network.requestWillBeSent");
        sent.filter_map(|event| event["params"]["request"]["url"].as_str().map(str::to_owned)).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}
