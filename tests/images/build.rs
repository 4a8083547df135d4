//! Builds: reproducibility, faults, interruptions, and what the images contain.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::UNIX_EPOCH;

use bakehouse_tests::{CommandOutput, TestFleet, first_difference, root, shared_store, tar_differences};
use builder::project::Project;
use fleet::Membership;

const ARTEFACTS: [&str; 5] =
    ["ha-hub_1.raw", "ha-hub_1.efi", "ha-hub_1.manifest.json", "ha-hub_1.spdx.json", "SHA256SUMS"];

fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum");
    String::from_utf8_lossy(&output.stdout)[..64].to_owned()
}

fn built_layer(store: &Path) -> PathBuf {
    let layers = fs::read_dir(store.join("layers")).expect("a store").flatten().map(|e| e.path());
    layers.into_iter().find(|l| l.join("layer.json").exists()).expect("a finished layer").join("root.tar")
}

#[test]
fn two_cold_builds_are_identical() {
    let one = TestFleet::of_fleet("same-1", "ha").with_own_store();
    let two = TestFleet::of_fleet("same-2-in-a-longer-path", "ha").with_own_store();
    one.ok(&["build", "hub"]);
    // The second build has another umask, time zone, language, time, and current folder.
    let mut other = two.command(&["build", "hub"]);
    other.env("TZ", "Asia/Tokyo").env("LANG", "tr_TR.UTF-8").current_dir("/");
    let line = format!("umask 077; exec \"$0\" {}", r#""$@""#);
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(line).arg(other.get_program()).args(other.get_args());
    shell.envs(other.get_envs().filter_map(|(k, v)| Some((k, v?)))).current_dir("/");
    let answer = CommandOutput::new(&shell.output().expect("sh"));
    assert_eq!(answer.status, 0, "{}", answer.err);

    let (a, b) = (one.dir.join("build/hub"), two.dir.join("build/hub"));
    if let Some(difference) = first_difference(&a, &b, &ARTEFACTS.map(str::to_owned)) {
        let layers = (built_layer(&one.dir.join("store")), built_layer(&two.dir.join("store")));
        panic!("{difference}\nfiles of the packages' tree: {:#?}", tar_differences(&layers.0, &layers.1));
    }
    for name in ARTEFACTS {
        println!("{name}\n  {}\n  {}", sha256(&a.join(name)), sha256(&b.join(name)));
    }
    // SHA256SUMS matches the files.
    let check = Command::new("sha256sum").args(["-c", "--quiet", "SHA256SUMS"]).current_dir(&a).status();
    assert!(check.expect("sha256sum").success());
    for lab in [one, two] {
        fs::remove_dir_all(&lab.dir).expect("the lab is writable");
    }
}

#[test]
fn changed_template_rebuilds_from_bake_and_equals_a_cold_build() {
    let lab = TestFleet::of_fleet("warm", "ha");
    lab.ok(&["build", "hub"]);
    let again = lab.ok(&["build", "hub"]);
    assert!(again.err.contains("hub: unchanged"), "{}", again.err);

    lab.edit("overlays/haproxy/run/bakehouse/haproxy.cfg.j2", "maxconn 4000", "maxconn 4001");
    let warm = lab.ok(&["build", "hub", "-v"]);
    assert!(warm.err.contains("changed: overlays/haproxy/run/bakehouse/haproxy.cfg.j2\n"), "{}", warm.err);
    for step in [" compose ", " erofs ", " initrd ", " tools "] {
        assert!(!warm.err.contains(step), "{step} ran again:\n{}", warm.err);
    }
    let cold = TestFleet::of_fleet("cold", "ha").with_own_store();
    cold.edit("overlays/haproxy/run/bakehouse/haproxy.cfg.j2", "maxconn 4000", "maxconn 4001");
    cold.ok(&["build", "hub"]);
    let difference =
        first_difference(&lab.dir.join("build/hub"), &cold.dir.join("build/hub"), &ARTEFACTS.map(str::to_owned));
    assert_eq!(difference, None);
    // veritysetup accepts the hash tree.
    verity_agrees(&lab.dir.join("build/hub/ha-hub_1.raw"), &lab.read("build/hub/ha-hub_1.manifest.json"));
    fs::remove_dir_all(&cold.dir).expect("the lab is writable");
}

fn verity_agrees(disk: &Path, manifest: &str) {
    let manifest: serde_json::Value = serde_json::from_str(manifest).expect("JSON");
    let slot = manifest["sizes"]["root_slot"].as_u64().expect("a number");
    let dir = tempfile::tempdir().expect("a folder");
    let part = |name: &str, skip: u64, mib: u64| {
        let out = dir.path().join(name);
        let mut dd = Command::new("dd");
        dd.arg(format!("if={}", disk.display())).arg(format!("of={}", out.display()));
        dd.args(["bs=1M", "conv=sparse", "status=none"]).arg(format!("skip={skip}")).arg(format!("count={mib}"));
        assert!(dd.status().expect("dd").success());
        out
    };
    let root = part("root", 257, slot >> 20);
    let verity = part("verity", 257 + (slot >> 20), 64);
    let mut check = Command::new("veritysetup");
    check.arg("verify").args([&root, &verity]).arg(manifest["roothash"].as_str().expect("a hash"));
    let answer = CommandOutput::new(&check.output().expect("veritysetup"));
    assert_eq!(answer.status, 0, "{}{}", answer.out, answer.err);
}

#[test]
fn failed_daemon_check_reports_its_message_and_the_templates_line() {
    let lab = TestFleet::of_fleet("refused", "ha");
    lab.ok(&["build", "hub"]);
    let before = sha256(&lab.dir.join("build/hub/ha-hub_1.efi"));
    let run = |overlay: &str, file: &str| format!("overlays/{overlay}/run/bakehouse/{file}.j2");
    let unit = "overlays/hub/usr/lib/systemd/system/role-hub.target".to_owned();
    let cases = [
        ("hub", run("haproxy", "haproxy.cfg"), "    maxconn 4000", "    maxxconn 4000", "unknown keyword 'maxxconn'"),
        ("hub", run("bird", "bird.conf"), "    hold time {{", "    hold thyme {{", "syntax error"),
        ("hub", run("keepalived", "keepalived.conf"), "    advert_int {{", "    advert_intt {{", "advert_intt"),
        ("hub", run("nftables", "nftables.conf"), "policy drop", "policy dropp", "syntax error"),
        ("hub", unit, "Requires=", "Requirres=", "Requirres"),
    ];
    for (group, path, from, to, words) in cases {
        lab.edit(&path, from, to);
        let line = lab.read(&path).lines().position(|l| l.contains(to)).expect("the line") + 1;
        let place = format!("{path}:{line}");
        lab.run(&["build", group]).fails(2, &[&place, words]);
        fs::remove_file(lab.dir.join(&path)).expect("the edit");
    }
    // These daemons name the key and not the line.
    let cases = [
        ("hub", run("etcd", "etcd.yml"), "election-timeout: {{ 1000", "election-timeout: {{ 10", "election-timeout"),
        ("db", run("patroni", "patroni.yml"), "verify_client: optional", "verify_client: maybe", "verify_client"),
        ("db", run("patroni", "patroni.yml"), "bin_dir: {{ programs }}", "bin_dir: /nowhere", "bin_dir"),
        ("db", run("pgbackrest", "pgbackrest.conf"), "start-fast=y", "start-fats=y", "start-fats"),
        ("app", run("odoo", "odoo.conf"), "list_db = False", "list_dbs = False", "unknown option 'list_dbs'"),
        (
            "monitor",
            run("prometheus", "prometheus.yml"),
            "scrape_timeout: {{ 4 *",
            "scrape_timeout: {{ 40 *",
            "scrape timeout",
        ),
        (
            "monitor",
            run("prometheus", "alertmanager.yml"),
            "route:\n  receiver: discard",
            "route:\n  receiver: somebody",
            "somebody",
        ),
    ];
    for (group, path, from, to, words) in cases {
        lab.edit(&path, from, to);
        lab.run(&["build", group]).fails(2, &[&path, words]);
        fs::remove_file(lab.dir.join(&path)).expect("the edit");
    }
    assert_eq!(sha256(&lab.dir.join("build/hub/ha-hub_1.efi")), before, "a failed build changed the image");
}

#[test]
fn generated_file_is_cached_by_its_inputs() {
    let lab = TestFleet::of_fleet("made", "ha");
    lab.edit("fleet.toml", "[groups.hub]", "[groups.hub]\noverlays = [\"mine\"]");
    let toml = |command: &str| {
        format!(
            "description = \"A generated file\"\n[[make]]\nfile = \"usr/share/mine/users\"\nof = [\"usr/share/mine/by\"]\n\
             command = [\"sh\", \"-ec\", \"{command}\"]\n"
        )
    };
    // The store must not have the file from an earlier run.
    let now = UNIX_EPOCH.elapsed().expect("a clock").as_nanos();
    lab.write("overlays/mine/usr/share/mine/by", &format!("sort -r /etc/passwd # {now}"));
    lab.write("overlays/mine/overlay.toml", &toml("sh /usr/share/mine/by > /usr/share/mine/users"));
    let first = lab.ok(&["build", "hub"]);
    assert!(first.err.contains("make hub: usr/share/mine/users"), "{}", first.err);
    let sum = |lab: &TestFleet| {
        let manifest: serde_json::Value =
            serde_json::from_str(&lab.read("build/hub/ha-hub_1.manifest.json")).expect("JSON");
        manifest["files"]["usr/share/mine/users"].as_str().map(str::to_owned).expect("a file of the image")
    };
    let made = sum(&lab);
    // Without a change of its inputs, the builder does not generate the file again.
    lab.edit("fleet.toml", "version = \"1\"", "version = \"2\"");
    let second = lab.ok(&["build", "hub"]);
    assert!(!second.err.contains("make hub"), "{}", second.err);
    lab.edit("fleet.toml", "version = \"2\"", "version = \"1\"");
    lab.write("overlays/mine/usr/share/mine/by", "sort /etc/passwd");
    lab.ok(&["build", "hub"]);
    assert_ne!(sum(&lab), made);
    let explained = lab.ok(&["explain", "/usr/share/mine/users", "--group", "hub"]).out;
    assert!(explained.contains("generated during the build by `sh -ec"), "{explained}");
    // The error of a failed program has its message, and a program that creates no file is an error.
    lab.write("overlays/mine/overlay.toml", &toml("echo no flour >&2; exit 3"));
    lab.run(&["build", "hub"]).fails(1, &["overlays/mine: /usr/share/mine/users", "no flour"]);
    lab.write("overlays/mine/overlay.toml", &toml("true"));
    lab.run(&["build", "hub"]).fails(1, &["overlays/mine: /usr/share/mine/users", "No such file"]);
    // The program cannot bring files of this host or private keys into the image.
    let outside = lab.dir.join("fleet.toml");
    lab.write("overlays/mine/overlay.toml", &toml(&format!("ln -s {} /usr/share/mine/users", outside.display())));
    lab.run(&["build", "hub"]).fails(1, &["overlays/mine: /usr/share/mine/users", "is not a regular file"]);
    let key = concat!("echo -----BEGIN ", "PRIVATE KEY----- > /usr/share/mine/users");
    lab.write("overlays/mine/overlay.toml", &toml(key));
    lab.run(&["build", "hub"]).fails(2, &["usr/share/mine/users:1: holds a private key"]);
}

/// Two hubs, and a group of two nodes with one image: one of the two has the third vote in etcd.
#[test]
fn group_with_one_voter_builds() {
    let lab = TestFleet::empty("one-voter");
    lab.write(
        "fleet.toml",
        "name = \"votes\"\nversion = \"1\"\n[groups.hub]\ncount = 2\nendpoints = [\"one.example.net\", \"two.example.net\"]\n\
         [groups.edge]\ncount = 2\nfirst = \"10.10.0.40\"\n",
    );
    lab.has_idle_role("edge", false);
    assert!(lab.ok(&["check"]).out.contains("etcd votes: hub-1, hub-2, edge-1"));
    lab.ok(&["lock"]);
    lab.ok(&["build", "edge"]);
}

/// A script of a package that imports a Python module must not leave the compiled module in the image.
#[test]
fn bytecode_in_the_image_does_not_depend_on_the_time() {
    plays_in_the_image_of("app", "bytecode", include_str!("../src/bytecode.py"), &[]);
}

/// Runs Odoo and PostgreSQL of the image in its tree.
#[test]
fn odoo_users_notice_no_change_of_the_primary() {
    plays_in_the_image_of("app", "switchover", include_str!("../src/switchover.py"), &[]);
}

#[test]
fn base_backup_of_a_stalled_standby_completes() {
    plays_in_the_image_of("db", "copy", include_str!("../src/copy.py"), &[]);
}

/// HAProxy 3.0.11 of Debian 13 leaves clients that are connecting hanging if it shuts down a server's sessions, so Odoo
/// limits the time for a connection.
#[test]
fn no_client_of_the_database_hangs_during_a_failover() {
    let project = Project::load(&root().join("profiles/fleets/ha.toml")).expect("a valid fleet.toml");
    let node = project.topology.node("app-1").expect("app-1");
    let overlay = project.overlay("haproxy").expect("the overlay exists");
    let odoo = project.overlay("odoo").expect("the overlay exists");
    let member = Membership::sample();
    let context = project.context(node, &member);
    let rendered = |file: &str| {
        let mut files = overlay.files.iter().chain(&odoo.files);
        let (name, text) = files.find(|(name, _)| name.ends_with(file)).expect("a template");
        fleet::render(name, &String::from_utf8_lossy(text), &context).expect("a valid template")
    };
    let (config, environment) = (rendered("haproxy.cfg.j2"), rendered("odoo.env.j2"));
    let files = [("haproxy.cfg", config.as_str()), ("odoo.env", environment.as_str())];
    plays_in_the_image_of("app", "proxy", include_str!("../src/database_proxy.py"), &files);
}

/// Builds a group's image with an additional check, a Python program that runs in the image's tree.
#[track_caller]
fn plays_in_the_image_of(group: &str, name: &str, program: &str, files: &[(&str, &str)]) {
    let lab = TestFleet::of_fleet(name, "ha");
    let table = format!("[groups.{group}]");
    lab.edit("fleet.toml", &table, &format!("{table}\noverlays = [\"{name}\"]"));
    let folder = format!("usr/share/{name}");
    lab.write(
        &format!("overlays/{name}/overlay.toml"),
        &format!("[[check]]\nof = [\"{folder}/\"]\ncommand = [\"python3\", \"/{folder}/play\"]\n"),
    );
    // The store must not have the check's result from an earlier run.
    let now = UNIX_EPOCH.elapsed().expect("a clock").as_nanos();
    lab.write(&format!("overlays/{name}/{folder}/play"), &format!("{program}# {now}\n"));
    lab.write(&format!("overlays/{name}/{folder}/sandbox.py"), include_str!("../src/sandbox.py"));
    for (file, text) in files {
        lab.write(&format!("overlays/{name}/{folder}/{file}"), text);
    }
    lab.ok(&["build", group]);
}

#[test]
fn rejects_colliding_overlays_unknown_variables_and_secrets() {
    let lab = TestFleet::of_fleet("overlays", "ha");
    lab.edit("fleet.toml", "[groups.db]", "overlays = [\"mine\"]\n\n[groups.db]");
    lab.write("overlays/mine/etc/fstab", "nothing\n");
    lab.run(&["build", "hub"])
        .fails(2, &["overlays/base/etc/fstab and overlays/mine/etc/fstab both install /etc/fstab"]);
    fs::remove_file(lab.dir.join("overlays/mine/etc/fstab")).expect("the file");
    lab.write("overlays/mine/run/x.conf.j2", "fine\n{{ node.nmae }}\n");
    lab.run(&["check"]).fails(2, &["overlays/mine/run/x.conf.j2:2", "undefined"]);
    lab.write("overlays/mine/run/x.conf.j2", concat!("-----BEGIN ", "PRIVATE KEY-----\n"));
    lab.run(&["check"]).fails(2, &["overlays/mine/run/x.conf.j2:1: holds a private key"]);
    lab.write("overlays/mine/overlay.toml", "[files.\"etc/y\"]\nmode = \"0600\"\nuser = \"no-such-user\"\n");
    lab.write("overlays/mine/run/x.conf.j2", "fine\n");
    lab.write("overlays/mine/etc/y", "y\n");
    lab.run(&["build", "hub"]).fails(1, &["overlays/mine/overlay.toml: etc/y belongs to the user `no-such-user`"]);
    fs::remove_file(lab.dir.join("overlays/mine/etc/y")).expect("the file");
    // A migration without a program, and a migration before a unit that does not exist.
    let program = "usr/lib/bakehouse/migrations/move";
    let migration = "[[migration]]\nname = \"move\"\nbefore = \"missing.service\"\n";
    lab.write("overlays/mine/overlay.toml", migration);
    lab.run(&["build", "hub"])
        .fails(1, &["migration `move` needs the program overlays/mine/usr/lib/bakehouse/migrations"]);
    lab.write("overlays/mine/overlay.toml", &format!("{migration}[files.\"{program}\"]\nmode = \"0755\"\n"));
    lab.write(&format!("overlays/mine/{program}"), "#!/bin/sh\n");
    lab.run(&["build", "hub"]).fails(1, &["the image has no unit missing.service"]);
}

#[test]
fn closed_output_ends_a_command_quietly_after_its_work() {
    let lab = TestFleet::of_fleet("unread", "ha");
    let run = |command: &mut Command| CommandOutput::new(&command.output().expect("bakehouse starts"));
    let unread = || {
        let (reader, writer) = io::pipe().expect("a pipe");
        drop(reader);
        writer
    };
    let answer = run(lab.command(&["check", "--json"]).stdout(unread()));
    assert_eq!((answer.status, answer.err.as_str()), (141, ""));
    // Standard output is a full disk.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("a device");
    run(lab.command(&["check", "--json"]).stdout(full))
        .fails(1, &["cannot write standard output: No space left on device"]);

    lab.edit("fleet.toml", "[groups.db]", "packages = [\"jq\"]\n\n[groups.db]");
    assert_eq!(run(lab.command(&["lock", "--update"]).stdout(unread())).status, 141);
    assert!(lab.read("bakehouse.lock").contains("/jq_"), "the lock was not written");

    // Warnings and errors on a closed stderr.
    assert_eq!(run(lab.command(&["check"]).stderr(unread())).status, 0);
    lab.edit("fleet.toml", "packages =", "pakcages =");
    assert_eq!(run(lab.command(&["check"]).stderr(unread())).status, 2);
}

#[test]
fn errors_in_fleet_and_lock_name_the_fix() {
    let lab = TestFleet::of_fleet("wrong", "ha");
    lab.edit("fleet.toml", "[groups.db]", "packages = [\"jq\"]\n\n[groups.db]");
    lab.run(&["build", "hub"]).fails(1, &["lacks the package `jq`, which `hub` requests", "bakehouse lock"]);
    lab.edit("fleet.toml", "jq", "no-such-package");
    lab.run(&["lock"]).fails(1, &["no-such-package", "[groups.hub] in", "check its name"]);
    lab.edit("fleet.toml", "packages =", "pakcages =");
    lab.run(&["check"]).fails(2, &["fleet.toml:10", "^^^^^^^^", "did you mean `packages`?"]);
    lab.run(&["build", "nonsense"]).fails(2, &["fleet.toml:10"]);
    lab.edit("fleet.toml", "pakcages = [\"no-such-package\"]\n", "");
    lab.run(&["build", "nonsense"]).fails(2, &["no group `nonsense`", "hub"]);
    lab.run(&["frob"]).fails(2, &["frob"]);
    lab.edit("fleet.toml", "version = \"1\"", "version = \"1\"\nimage.root_size = \"40M\"");
    lab.run(&["build", "hub"]).fails(2, &["a root slot of 40M is too small: role `app` needs"]);
    lab.write(
        "fleet.toml",
        "name = \"ha\"\nimage.root_size = \"40M\"\n[groups.hub]\ncount = 3\nendpoints = [\"a\", \"b\", \"c\"]\n",
    );
    lab.ok(&["lock"]);
    lab.run(&["build", "hub"]).fails(1, &["do not fit a root partition of 42 MB", "root_size"]);
}

#[test]
fn unreachable_or_false_mirror_is_reported_and_leaves_the_store_valid() {
    let lab = TestFleet::of_fleet("mirrors", "ha");
    // No server listens on this port.
    lab.run(&["lock", "--update", "--mirror", "http://127.0.0.1:9/debian"])
        .fails(1, &["127.0.0.1:9", "check the mirror"]);
    assert!(lab.dir.join("bakehouse.lock").exists(), "the failed command removed the lock");
    // A mirror with wrong content in every package.
    let liar = lab.dir.join("liar");
    let lock = lab.read("bakehouse.lock");
    for line in lock.lines().filter_map(|l| l.strip_prefix("path = \"")?.strip_suffix('"')) {
        for archive in ["debian", "debian-security"] {
            let path = liar.join(archive).join(line);
            fs::create_dir_all(path.parent().expect("a folder")).expect("the lab is writable");
            fs::write(path, "not a package").expect("the lab is writable");
        }
    }
    let store = tempfile::tempdir().expect("a folder");
    let mut fetch = lab.command(&["fetch", "--mirror", &format!("file://{}/debian", liar.display())]);
    fetch.env("BAKEHOUSE_STORE", store.path());
    CommandOutput::new(&fetch.output().expect("bakehouse")).fails(1, &["cannot download", "but the lock has"]);
    let stored = fs::read_dir(store.path().join("debs")).expect("a store").flatten();
    let whole: Vec<_> = stored.map(|e| e.path()).filter(|p| p.extension().is_none()).collect();
    assert_eq!(whole, Vec::<PathBuf>::new());
}

#[test]
fn full_disk_is_reported_before_the_build_and_leaves_no_files() {
    let lab = TestFleet::of_fleet("full", "ha");
    // The small disk is a tmpfs in a mount namespace.
    let build_with = |size: &str, at: &str, then: &str| {
        let script = format!(
            "cd {dir}; mkdir -p {at} && mount -t tmpfs -o size={size} tmpfs {at}; {then} {bin} build hub; code=$?; ls -A build/hub; exit $code",
            dir = lab.dir.display(),
            bin = root().join("target/release/bakehouse").display()
        );
        // Root needs no user namespace, in which the sandbox would have no ids.
        let user: &[&str] = if nix::unistd::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
        let output = Command::new("unshare").args(user).args(["--mount", "sh", "-c", &script]).output();
        CommandOutput::new(&output.expect("unshare"))
    };
    let answer = build_with("64M", "build", "");
    answer.fails(1, &["hub: the image may need", "are free; make room"]);
    assert_eq!(answer.out, "");
    // The space that the message names is enough.
    lab.ok(&["build", "hub"]);
    let said = build_with("64M", "build", "").err;
    let asked = said.split_once("may need ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u32>().ok());
    let answer = build_with(&format!("{}M", asked.expect("a number") + 1), "build", "");
    assert_eq!(answer.status, 0, "{}", answer.err);
    // A store with all inputs, which needs no space for another layer.
    fs::remove_dir_all(lab.dir.join("build")).expect("the lab is writable");
    let full = format!("ln -s {}/*/ store/; BAKEHOUSE_STORE=$PWD/store", shared_store().display());
    let answer = build_with("300M", "store", &full);
    assert_eq!(answer.status, 0, "{}", answer.err);
    let empty = format!("rm -r build; ln -s {}/debs store/; BAKEHOUSE_STORE=$PWD/store", shared_store().display());
    let answer = build_with("300M", "store", &empty);
    answer.fails(1, &["hub: the store may need", "are free; make room (`bakehouse store gc`) or set BAKEHOUSE_STORE"]);
}

#[test]
fn interrupted_build_leaves_no_partial_files_and_the_next_one_completes() {
    let lab = TestFleet::of_fleet("interrupted", "ha").with_own_store();
    let layers = lab.dir.join("store/tmp");
    // Interrupts while the sandbox composes.
    let composing = |_: u32| {
        fs::read_dir(&layers).is_ok_and(|d| d.flatten().any(|e| e.file_name().to_string_lossy().starts_with("layers-")))
    };
    assert_eq!(lab.interrupt(&["build", "hub"], composing), 130);
    assert!(!lab.dir.join("build/hub/ha-hub_1.raw").exists());
    // Then interrupts after each step. The store keeps finished steps, so the build completes after a few runs.
    let steps: Vec<String> = std::iter::repeat_with(|| lab.interrupt_after_a_line(&["build", "hub"]))
        .take(20)
        .take_while(|line| !line.contains("unchanged"))
        .collect();
    assert!((3..20).contains(&steps.len()), "{steps:#?}");
    let other = TestFleet::of_fleet("uninterrupted", "ha");
    other.ok(&["build", "hub"]);
    let folders = [&lab, &other].map(|l| l.dir.join("build/hub"));
    assert_eq!(first_difference(&folders[0], &folders[1], &ARTEFACTS.map(str::to_owned)), None);
    for lab in [lab, other] {
        fs::remove_dir_all(&lab.dir).expect("the lab is writable");
    }
}

#[test]
fn interrupted_lock_changes_nothing_and_interrupted_fetch_resumes() {
    let lab = TestFleet::of_fleet("interrupted-fetch", "ha").with_empty_store();
    let before = lab.read("bakehouse.lock");
    // Interrupts while apt runs.
    let children = |pid: u32| {
        let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        listed.is_ok_and(|c| !c.trim().is_empty())
    };
    assert_eq!(lab.interrupt(&["lock", "--update"], children), 130);
    assert_eq!(lab.read("bakehouse.lock"), before);

    // Interrupts after some packages have arrived.
    let debs = lab.dir.join("store/debs");
    let some =
        |_: u32| fs::read_dir(&debs).is_ok_and(|d| d.flatten().filter(|e| e.path().extension().is_none()).count() > 5);
    assert_eq!(lab.interrupt(&["fetch"], some), 130);
    let kept = fs::read_dir(&debs).expect("a store").flatten().filter(|e| e.path().extension().is_none()).count();
    assert!(kept > 5);
    let rest = lab.ok(&["fetch"]);
    assert!(rest.err.contains("packages"), "{}", rest.err);
    assert!(!lab.ok(&["fetch"]).err.contains("packages"), "fetched the packages again");
    fs::remove_dir_all(&lab.dir).expect("the lab is writable");
}

/// Without root the builder uses user namespaces.
#[test]
fn unprivileged_user_builds_the_same_image() {
    let lab = TestFleet::of_fleet("user", "ha");
    lab.ok(&["build", "hub"]);
    let user = "bakehouse-test";
    let have = Command::new("id").arg(user).output().expect("id").status.success();
    if !have {
        let made = Command::new("useradd").args(["--create-home", "--shell", "/bin/sh", user]).status();
        assert!(made.expect("useradd").success(), "useradd failed: run this test as root");
    }
    let home = PathBuf::from(format!("/home/{user}/lab"));
    let _ = fs::remove_dir_all(&home);
    fs::create_dir_all(home.join("store/debs")).expect("a home");
    for (from, to) in [("fleet.toml", "fleet.toml"), ("bakehouse.lock", "bakehouse.lock")] {
        fs::copy(lab.dir.join(from), home.join(to)).expect("the lab is writable");
    }
    for binary in ["bakehouse", "firstboot"] {
        fs::copy(root().join("target/release").join(binary), home.join(binary)).expect("the binaries");
    }
    let debs = Command::new("cp").arg("-r").arg(shared_store().join("debs")).arg(home.join("store")).status();
    assert!(debs.expect("cp").success());
    assert!(Command::new("chown").args(["-R", user]).arg(&home).status().expect("chown").success());
    let line = format!("cd {h} && BAKEHOUSE_STORE={h}/store ./bakehouse -C {h} build hub", h = home.display());
    let output =
        Command::new("setpriv").args(["--reuid", user, "--regid", user, "--init-groups", "sh", "-c", &line]).output();
    let answer = CommandOutput::new(&output.expect("setpriv"));
    assert_eq!(answer.status, 0, "{}", answer.err);
    let difference =
        first_difference(&lab.dir.join("build/hub"), &home.join("build/hub"), &ARTEFACTS.map(str::to_owned));
    assert_eq!(difference, None);
    let image = home.join("build/hub/ha-hub_1.raw");
    assert_eq!(fs::metadata(image).expect("the image").permissions().mode() & 0o777, 0o644);
    fs::remove_dir_all(&home).expect("the lab is writable");
}
