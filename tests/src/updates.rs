//! A fleet of one hub that takes its updates from a folder on loopback.

use std::fs;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use crate::{ETCDCTL, Lab, Machine};

/// Has a node look for a newer version, and says which it was offered.
pub const LOOK: &str = "systemctl start firstboot-check; cat /run/bakehouse/offer";

pub const READY: &str = "bakehouse: ready (hub-1)";

/// The folder that was published, on loopback.
pub struct Server(Child);

impl Server {
    fn of(lab: &Lab, port: u16) -> Self {
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
pub fn version(lab: &Lab, from: &str, to: &str) {
    lab.edit("fleet.toml", &format!("version = \"{from}\""), &format!("version = \"{to}\""));
}

/// Waits until the node has come up as often as this since it was switched on.
pub fn comes_up(hub: &Machine, times: usize) {
    hub.wait_until(&format!("{READY} {times} times"), |console| console.matches(READY).count() >= times);
}

/// The version that runs.
pub fn runs(hub: &Machine) -> String {
    hub.ok("sed -n 's/^IMAGE_VERSION=//p' /usr/lib/os-release").replace('"', "")
}

/// Waits until the image that runs has proven itself; until then no other is taken.
pub fn is_blessed(node: &Machine) {
    let version = runs(node);
    node.ok(&format!(
        "for i in $(seq 120); do ls /efi/EFI/Linux | grep -q '_{version}.efi$' && exit; sleep 2; done; exit 1"
    ));
}

/// Publishes what fleet.toml says.
pub fn publish(lab: &Lab) {
    lab.ok(&["publish", lab.dir.join("updates").to_str().expect("a UTF-8 path")]);
}

/// Has version 2, changed in one file, ready for `offer`. A build beside emulated machines takes the time in which
/// a primary has to show that it lives: its watchdog restarts it.
pub fn prepare(lab: &Lab, file: &str, from: &str, to: &str) {
    version(lab, "1", "2");
    lab.edit(file, from, to);
    lab.ok(&["publish", lab.dir.join("next").to_str().expect("a UTF-8 path")]);
    version(lab, "2", "1");
    fs::remove_file(lab.dir.join(file)).expect("the edit");
}

/// Publishes it.
pub fn offer(lab: &Lab) {
    for entry in fs::read_dir(lab.dir.join("next")).expect("it was prepared").flatten() {
        fs::rename(entry.path(), lab.dir.join("updates").join(entry.file_name())).expect("the lab is writable");
    }
}

/// The fleet, of the name `up`, built, which looks for updates when it is told to; and the server.
pub fn lab_of_one(name: &str) -> (Lab, Server) {
    let lab = Lab::empty(name);
    lab.write(
        "fleet.toml",
        "name = \"up\"\nversion = \"1\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub1.example.net\"]\n",
    );
    let server = serve_updates(&lab);
    lab.ok(&["build"]);
    (lab, server)
}

/// Has a fleet's nodes look here for updates, when they are told to.
pub fn serve_updates(lab: &Lab) -> Server {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let fleet = lab.read("fleet.toml");
    let update = format!("[update]\nurl = \"http://192.0.2.100:{port}/\"\nwhen = \"2099-01-01\"\n");
    lab.write("fleet.toml", &format!("{fleet}\n{update}"));
    // It asks for packages, and has a key.
    lab.ok(&["lock"]);
    lab.init();
    Server::of(lab, port)
}

/// Makes the next version one that converts what a node keeps: a line in `/var/lib/converted` for each time.
pub fn converting(lab: &Lab) {
    lab.edit("fleet.toml", "[groups.hub]", "[groups.hub]\noverlays = [\"converting\"]");
    let program = "usr/lib/bakehouse/migrations/lines";
    let migration = "[[migration]]\nname = \"lines\"\nbefore = \"haproxy.service\"\n";
    lab.write("overlays/converting/overlay.toml", &format!("{migration}[files.\"{program}\"]\nmode = \"0755\"\n"));
    lab.write(&format!("overlays/converting/{program}"), "#!/bin/sh\nexec echo converted >> /var/lib/converted\n");
}

/// Makes the next version one that builds and does not work.
pub fn broken(lab: &Lab) {
    lab.edit(
        "profiles/roles/hub.toml",
        "[health]\nunits = [",
        "[units.wants]\n\"role-hub.target\" = [\"broken.service\"]\n\n[health]\nunits = [\"broken.service\", ",
    );
    lab.edit("profiles/roles/hub.toml", "overlays = [", "overlays = [\"broken\", ");
    lab.write("overlays/broken/overlay.toml", "description = \"What does not work\"\n");
    lab.write(
        "overlays/broken/usr/lib/systemd/system/broken.service",
        "[Unit]\nDescription=It does not work\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/false\n",
    );
}

/// And the one after it one that does.
pub fn mended(lab: &Lab) {
    lab.edit("overlays/broken/usr/lib/systemd/system/broken.service", "/usr/bin/false", "/usr/bin/true");
}

/// Waits until the broken version was tried three times and the one before it serves again.
pub fn goes_back(hub: &Machine) {
    // The older one's own start is the last.
    hub.wait_until("three tries, and back", |console| {
        console.matches("this image is not well: broken.service has failed").count() >= 3
            && console.rsplit("this image is not well").next().is_some_and(|rest| rest.contains(READY))
    });
}

/// Waits until every hub knows that this version is none to try; says why.
pub fn is_denied(hub: &Machine, version: &str) -> String {
    let denied = format!("{ETCDCTL} get --prefix --print-value-only /bakehouse/rollout/denied/{version}");
    let said = hub.ok(&format!("for i in $(seq 60); do {denied} | grep . && exit; sleep 2; done; exit 1"));
    assert!(said.contains("did not come up on "), "{said}");
    assert_eq!(hub.ok(&format!("{ETCDCTL} get /bakehouse/rollout/turn")), "");
    said
}
