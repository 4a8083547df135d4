//! A fleet with one hub that downloads its updates from an HTTP server on loopback.

use std::fs;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use crate::{ETCDCTL, Machine, TestFleet};

/// Starts a node's check for updates, and prints the version that is offered.
// systemd refuses a sixth start within 10 s, unless its counter is reset.
pub const LOOK: &str =
    "systemctl reset-failed firstboot-check 2>/dev/null; systemctl start firstboot-check; cat /run/bakehouse/offer";

/// Line on the console of a hub that is ready.
pub const READY: &str = "bakehouse: ready (hub-1)";

/// HTTP server of the published folder.
pub struct Server(Child);

impl Server {
    fn new(lab: &TestFleet, port: u16) -> Self {
        fs::create_dir_all(lab.dir.join("updates")).expect("the lab is writable");
        let mut httpd = Command::new("busybox");
        httpd.args(["httpd", "-f", "-p", &format!("127.0.0.1:{port}"), "-h"]).arg(lab.dir.join("updates"));
        Self(httpd.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("busybox"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Edits the fleet's version.
pub fn version(lab: &TestFleet, from: &str, to: &str) {
    lab.edit("fleet.toml", &format!("version = \"{from}\""), &format!("version = \"{to}\""));
}

/// Waits until the node has become ready this often since it was switched on.
pub fn comes_up(hub: &Machine, times: usize) {
    hub.wait_until(&format!("{READY} {times} times"), |console| console.matches(READY).count() >= times);
}

/// Returns the running version.
pub fn runs(hub: &Machine) -> String {
    hub.ok("sed -n 's/^IMAGE_VERSION=//p' /usr/lib/os-release").replace('"', "")
}

/// Waits until the boot entry of the running version is good. The agent installs no other version before.
pub fn is_blessed(node: &Machine) {
    let version = runs(node);
    node.ok(&format!(
        "for i in $(seq 120); do ls /efi/EFI/Linux | grep -q '_{version}.efi$' && exit; sleep 2; done; exit 1"
    ));
}

/// Publishes the version of fleet.toml.
pub fn publish(lab: &TestFleet) {
    lab.ok(&["publish", lab.dir.join("updates").to_str().expect("a UTF-8 path")]);
}

/// Builds version 2 with one changed file for [`offer`], before the machines start: a build beside emulated machines
/// slows a primary down until its watchdog resets it.
pub fn prepare(lab: &TestFleet, file: &str, from: &str, to: &str) {
    version(lab, "1", "2");
    lab.edit(file, from, to);
    lab.ok(&["publish", lab.dir.join("next").to_str().expect("a UTF-8 path")]);
    version(lab, "2", "1");
    fs::remove_file(lab.dir.join(file)).expect("the edit");
}

/// Publishes the version that [`prepare`] built.
pub fn offer(lab: &TestFleet) {
    for entry in fs::read_dir(lab.dir.join("next")).expect("a prepared version").flatten() {
        fs::rename(entry.path(), lab.dir.join("updates").join(entry.file_name())).expect("the lab is writable");
    }
}

/// Builds the fleet `up` of one hub, which checks for updates only when a test starts the check. Returns it with its
/// update server.
pub fn lab_of_one(name: &str) -> (TestFleet, Server) {
    let lab = TestFleet::empty(name);
    lab.write(
        "fleet.toml",
        "name = \"up\"\nversion = \"1\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub1.example.net\"]\n",
    );
    let server = serve_updates(&lab);
    lab.ok(&["build"]);
    (lab, server)
}

/// Starts an update server and points `[update]` of the fleet to it. Nodes check only when a test starts the check.
pub fn serve_updates(lab: &TestFleet) -> Server {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let fleet = lab.read("fleet.toml");
    let update = format!("[update]\nurl = \"http://192.0.2.100:{port}/\"\nwhen = \"2099-01-01\"\n");
    lab.write("fleet.toml", &format!("{fleet}\n{update}"));
    // `[update]` adds packages, and `publish` signs with the fleet key.
    lab.ok(&["lock"]);
    lab.init();
    Server::new(lab, port)
}

/// Adds a migration to the next version, which appends a line to `/var/lib/converted` at each run.
pub fn converting(lab: &TestFleet) {
    lab.edit("fleet.toml", "[groups.hub]", "[groups.hub]\noverlays = [\"converting\"]");
    let program = "usr/lib/bakehouse/migrations/lines";
    let migration = "[[migration]]\nname = \"lines\"\nbefore = \"haproxy.service\"\n";
    lab.write("overlays/converting/overlay.toml", &format!("{migration}[files.\"{program}\"]\nmode = \"0755\"\n"));
    lab.write(&format!("overlays/converting/{program}"), "#!/bin/sh\nexec echo converted >> /var/lib/converted\n");
}

/// Adds a failing service to the next version: the image builds, and its health check fails.
pub fn broken(lab: &TestFleet) {
    lab.edit(
        "profiles/roles/hub.toml",
        "[health]\nunits = [",
        "[units.wants]\n\"role-hub.target\" = [\"broken.service\"]\n\n[health]\nunits = [\"broken.service\", ",
    );
    lab.edit("profiles/roles/hub.toml", "overlays = [", "overlays = [\"broken\", ");
    lab.write("overlays/broken/overlay.toml", "description = \"A service that fails\"\n");
    lab.write(
        "overlays/broken/usr/lib/systemd/system/broken.service",
        "[Unit]\nDescription=Fails\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/false\n",
    );
}

/// Repairs the failing service in the version after that.
pub fn repaired(lab: &TestFleet) {
    lab.edit("overlays/broken/usr/lib/systemd/system/broken.service", "/usr/bin/false", "/usr/bin/true");
}

/// Waits until the broken version has failed three boots and the version before it serves again.
pub fn goes_back(hub: &Machine) {
    // The last start is the older version's.
    hub.wait_until("three failed boots and a rollback", |console| {
        console.matches("this image is not well: broken.service has failed").count() >= 3
            && console.rsplit("this image is not well").next().is_some_and(|rest| rest.contains(READY))
    });
}

/// Waits until etcd has a denial of this version. Returns its reason.
pub fn is_denied(hub: &Machine, version: &str) -> String {
    let denied = format!("{ETCDCTL} get --prefix --print-value-only /bakehouse/rollout/denied/{version}");
    let said = hub.ok(&format!("for i in $(seq 60); do {denied} | grep . && exit; sleep 2; done; exit 1"));
    assert!(said.contains("did not come up on "), "{said}");
    assert_eq!(hub.ok(&format!("{ETCDCTL} get /bakehouse/rollout/turn")), "");
    said
}
