//! `make bench`: builds the hub image with Bakehouse, and the same packages with mkosi and mmdebstrap, alternating on
//! one machine. Prints medians and ratios and asserts no limits.
//!
//! The peers run as root in a Debian tree of their own, so their versions do not depend on the host. They work on a
//! tmpfs with packages and indexes in their caches, so no measured time includes the network. They do not do what
//! Bakehouse adds: overlays, the agent, and the daemons' checks of their configurations.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use bakehouse_tests::{TestFleet, root};
use builder::packages::lock::Lock;
use builder::packages::mirror::Mirror;
use builder::project::Project;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

const ROUNDS: usize = 3;

const PEER_PACKAGES: &str = "apt-utils,cpio,cryptsetup-bin,debian-archive-keyring,dosfstools,dpkg-dev,e2fsprogs,\
    erofs-utils,kmod,mkosi,mmdebstrap,mtools,systemd-boot,systemd-boot-efi,systemd-container,systemd-repart,\
    systemd-ukify,udev,xz-utils,zstd";

/// Enters the peers' tree as `/`. mkosi requires `pivot_root` instead of chroot.
const ENTER: &str = r#"
set -e
root=$1; shift
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t tmpfs -o size=80% tmpfs "$root/var/tmp"
mount -t tmpfs tmpfs "$root/run"
cat /etc/resolv.conf > "$root/etc/resolv.conf"
mkdir -p "$root/host"
cd "$root"
pivot_root . host
umount -l host
exec "$@"
"#;

struct Peers {
    root: PathBuf,
    suite: String,
}

/// Wall and CPU seconds, one value a round.
#[derive(Default)]
struct Times {
    wall: Vec<f64>,
    cpu: Vec<f64>,
}

fn main() {
    assert!(nix::unistd::geteuid().is_root(), "the peers need root: run `make bench` as root");
    let lab = TestFleet::of_fleet("bench", "ha");
    lab.ok(&["fetch"]);
    let project = Project::load(&lab.dir).expect("a valid fleet.toml");
    let lock = Lock::load(&project).expect("a lock");
    let mirror = Mirror::for_project(&project, None).expect("a mirror");
    let peers = Peers::prepare(&mirror, &project, &lock);

    let mut times: [Times; 8] = Default::default();
    let mut stores = Vec::new();
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        // A store with only the packages.
        let cold = TestFleet::of_fleet(&format!("bench-{round}"), "ha").with_own_store();
        times[0].add(&mut cold.command(&["build", "hub"]));
        times[1].add(&mut peers.mkosi("default", &["-f", "--incremental=no", "--cache-directory=/bench/none"]));
        times[2].add(&mut peers.mkosi("tuned", &["-f", "--incremental=no", "--cache-directory=/bench/none"]));
        times[3].add(&mut peers.mmdebstrap());
        // One changed configuration file.
        cold.edit(
            "overlays/haproxy/run/bakehouse/haproxy.cfg.j2",
            "maxconn 4000",
            &format!("maxconn {}", 4000 + round),
        );
        times[4].add(&mut cold.command(&["build", "hub"]));
        times[5].add(&mut cold.command(&["build", "hub"]));
        for (i, form) in [(6, "default"), (7, "tuned")] {
            if round == 1 {
                Times::default().add(&mut peers.mkosi(form, &["-f", "--incremental=yes"]));
            }
            let file = peers.root.join(format!("bench/{form}/mkosi.extra/etc/stamp"));
            fs::write(file, format!("{round}\n")).expect("the peers' folder");
            times[i].add(&mut peers.mkosi(form, &["-f", "--incremental=yes"]));
        }
        stores.push(cold);
    }
    let image = stores[0].dir.join("build/hub/ha-hub_1.raw");
    let ours = allocated(&image);
    let theirs = |form: &str| allocated(&peers.root.join(format!("bench/out-{form}/image.raw")));
    let mut table = String::new();
    let mut row = |name: &str, times: &Times, against: Option<&Times>, to_us: Option<&Times>| {
        let ratio = |of: fn(&Times) -> f64, peer: Option<&Times>| {
            peer.map_or_else(|| "–".to_owned(), |p| format!("{:.2}", of(times) / of(p)))
        };
        let _ = writeln!(
            table,
            "| {name} | {:.2} | {:.2} | {} | {} | {} |",
            times.wall(),
            times.cpu(),
            ratio(Times::wall, against),
            ratio(Times::cpu, against),
            ratio(Times::wall, to_us),
        );
    };
    row("bakehouse, cold", &times[0], Some(&times[1]), Some(&times[2]));
    row("mkosi, default, cold", &times[1], None, None);
    row("mkosi, tuned, cold", &times[2], None, None);
    row("mmdebstrap to a tar", &times[3], None, None);
    row("bakehouse, one config changed", &times[4], Some(&times[6]), Some(&times[7]));
    row("mkosi, default, one config changed", &times[6], None, None);
    row("mkosi, tuned, one config changed", &times[7], None, None);
    row("bakehouse, unchanged", &times[5], None, None);
    println!(
        "\nhub image, {} packages, {ROUNDS} rounds, medians; {} CPUs\n",
        lock.packages_of("hub", false).len(),
        std::thread::available_parallelism().map_or(0, usize::from)
    );
    println!("| | wall s | CPU s | wall ÷ default mkosi | CPU ÷ default mkosi | wall ÷ tuned mkosi |");
    println!("|---|---|---|---|---|---|\n{table}");
    println!("CPU ÷ tuned mkosi, cold: {:.2}", times[0].cpu() / times[2].cpu());
    println!(
        "disk image, allocated: bakehouse {:.0} MB, mkosi default {:.0} MB (ratio {:.2}), mkosi tuned {:.0} MB (ratio {:.2})",
        ours / 1e6,
        theirs("default") / 1e6,
        ours / theirs("default"),
        theirs("tuned") / 1e6,
        ours / theirs("tuned"),
    );
    for lab in stores {
        fs::remove_dir_all(lab.dir).expect("the lab is writable");
    }
}

impl Times {
    fn add(&mut self, command: &mut Command) {
        let before = cpu();
        let start = Instant::now();
        let output = command.stdin(Stdio::null()).output().expect("the command starts");
        self.wall.push(start.elapsed().as_secs_f64());
        self.cpu.push(cpu() - before);
        assert!(
            output.status.success(),
            "{command:?}:\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn wall(&self) -> f64 {
        median(&self.wall)
    }

    fn cpu(&self) -> f64 {
        median(&self.cpu)
    }
}

/// Returns the CPU seconds of all children that have ended so far, and of their children.
fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("getrusage");
    (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn allocated(path: &Path) -> f64 {
    fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).blocks() as f64 * 512.0
}

impl Peers {
    /// Creates the peers' tree, their configuration and warm caches. The tree is kept between runs.
    fn prepare(mirror: &Mirror, project: &Project, lock: &Lock) -> Self {
        let suite = project.fleet.debian.suite.clone();
        let peers = Self { root: root().join("target/bench/peers"), suite };
        if !peers.root.join("etc/bench-ready").exists() {
            eprintln!("creating the peers' tree (once)");
            let _ = fs::remove_dir_all(&peers.root);
            fs::create_dir_all(&peers.root).expect("target/ is writable");
            let include = format!("--include={PEER_PACKAGES}");
            let mut command = Command::new("mmdebstrap");
            command.args(["--mode=root", "--variant=apt", &include, &peers.suite]);
            run(command.arg(&peers.root).arg(&mirror.archives["debian"]));
            fs::write(peers.root.join("etc/bench-ready"), "").expect("the peers' tree");
        }
        let bench = peers.root.join("bench");
        let _ = fs::remove_dir_all(&bench);
        let recipe = project.recipe("hub");
        let mut packages: Vec<&String> = recipe.profiles.iter().flat_map(|p| &p.packages).collect();
        packages.extend(recipe.profiles.iter().flat_map(|p| &p.hardware["cloud"][..]).take(1));
        let list: String = packages.iter().map(|p| format!("    {p}\n")).collect();
        let trim: String =
            recipe.profiles.iter().flat_map(|p| &p.trim.exclude).map(|glob| format!("    {glob}\n")).collect();
        let head = format!("[Distribution]\nDistribution=debian\nRelease={}\n", project.fleet.debian.suite);
        let caches = "[Build]\nPackageCacheDirectory=/bench/packages\nWorkspaceDirectory=/var/tmp\n";
        peers.write(
            "bench/make-initrd/mkosi.conf",
            &format!("[Include]\nInclude=mkosi-initrd\n{head}[Output]\nOutputDirectory=/bench\n{caches}"),
        );
        for form in ["default", "tuned"] {
            let mut conf = format!(
                "{head}[Output]\nFormat=disk\nOutputDirectory=/bench/out-{form}\n{caches}CacheDirectory=/bench/increments-{form}\n[Content]\nBootable=yes\nPackages=\n{list}"
            );
            if form == "tuned" {
                // The same kind of image and the same excludes, with a prebuilt initrd.
                let _ = write!(
                    conf,
                    "WithDocs=no\nEnvironment=INITRD=No\nInitrds=/bench/initrd.cpio.zst\nRemoveFiles=\n{trim}"
                );
                peers.write("bench/tuned/mkosi.repart/00-esp.conf", "[Partition]\nType=esp\nFormat=vfat\nCopyFiles=/boot:/\nCopyFiles=/efi:/\nSizeMinBytes=256M\nSizeMaxBytes=256M\n");
                peers.write("bench/tuned/mkosi.repart/10-root.conf", "[Partition]\nType=root\nFormat=erofs\nCompression=lz4\nCopyFiles=/\nVerity=data\nVerityMatchKey=root\nMinimize=best\n");
                peers.write(
                    "bench/tuned/mkosi.repart/11-verity.conf",
                    "[Partition]\nType=root-verity\nVerity=hash\nVerityMatchKey=root\nMinimize=best\n",
                );
            }
            peers.write(&format!("bench/{form}/mkosi.conf"), &conf);
            peers.write(&format!("bench/{form}/mkosi.extra/etc/stamp"), "0\n");
            fs::create_dir_all(bench.join(format!("increments-{form}"))).expect("the peers' tree");
            fs::create_dir_all(bench.join(format!("out-{form}"))).expect("the peers' tree");
        }
        // A build without increments deletes those in its cache folder, so cold builds use another folder.
        fs::create_dir_all(bench.join("none")).expect("the peers' tree");
        fs::create_dir_all(bench.join("packages")).expect("the peers' tree");
        let mut sources = String::new();
        for source in mirror.sources.iter().filter(|s| s.only.is_empty()) {
            let _ = write!(
                sources,
                "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n",
                mirror.archives[&source.archive],
                source.suite,
                source.components.join(" ")
            );
        }
        for config in ["make-initrd", "default", "tuned"] {
            // mkosi's default sources contain suites that not every mirror has.
            peers.write(&format!("bench/{config}/mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources"), &sources);
        }
        eprintln!("filling the peers' caches (once)");
        run(peers.enter().args(["mkosi", "-C", "/bench/default", "-f", "build"]));
        run(peers.enter().args(["mkosi", "-C", "/bench/make-initrd", "--cache-only=always", "-f", "build"]));

        // mmdebstrap has no cache, so it gets the locked packages from a mirror on its disk.
        for package in lock.packages_of("hub", false) {
            let name = format!("{}_{}.deb", package.name, package.sha256);
            let to = bench.join("mirror/pool").join(name);
            fs::create_dir_all(to.parent().expect("a folder")).expect("the peers' tree");
            fs::copy(bakehouse_tests::shared_store().join("debs").join(&package.sha256), to).expect("fetched files");
        }
        let suite = &peers.suite;
        // As in Bakehouse, an empty package satisfies the kernel's dependency on an initrd generator.
        let index = format!(
            "mkdir -p /bench/no-initrd/DEBIAN && cd /bench/no-initrd && printf 'Package: no-initrd\\nVersion: 1\\nArchitecture: all\\n\
             Maintainer: bench\\nProvides: linux-initramfs-tool\\nDescription: nothing\\n' > DEBIAN/control \
             && dpkg-deb -b . /bench/mirror/pool/no-initrd.deb && cd /bench/mirror && d=dists/{suite}/main/binary-amd64 && mkdir -p $d && apt-ftparchive packages pool > $d/Packages \
             && apt-ftparchive -o APT::FTPArchive::Release::Suite={suite} -o APT::FTPArchive::Release::Codename={suite} \
                -o APT::FTPArchive::Release::Architectures=amd64 -o APT::FTPArchive::Release::Components=main \
                release dists/{suite} > Release && mv Release dists/{suite}/"
        );
        run(peers.enter().args(["sh", "-c", &index]));
        peers.write("bench/mirror.list", &format!("deb [trusted=yes] copy:///bench/mirror {suite} main\n"));
        let names: Vec<&str> = lock.packages_of("hub", false).iter().map(|p| p.name.as_str()).collect();
        peers.write("bench/names", &format!("{},no-initrd", names.join(",")));
        peers
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("the peers' tree");
        fs::write(path, text).expect("the peers' tree");
    }

    fn enter(&self) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]).arg(&self.root);
        command
    }

    fn mkosi(&self, form: &str, options: &[&str]) -> Command {
        let mut command = self.enter();
        command.args(["mkosi", "-C", &format!("/bench/{form}"), "--cache-only=always"]).args(options).arg("build");
        command
    }

    fn mmdebstrap(&self) -> Command {
        let names = fs::read_to_string(self.root.join("bench/names")).expect("a prepared tree");
        let mut command = self.enter();
        command.args(["mmdebstrap", "--mode=root", "--variant=essential"]);
        command.arg(format!("--include={names}"));
        command.args([&self.suite, "/var/tmp/hub.tar", "/bench/mirror.list"]);
        command
    }
}

fn run(command: &mut Command) {
    Times::default().add(command);
}
