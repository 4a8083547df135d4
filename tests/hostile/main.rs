//! Hostile packages that attack the build host through their scripts, links and sizes.
//!
//! The test starts its own binary as the sandbox, like `bakehouse`, and in the sandbox as the attacker. Real packages
//! take the real path from a .deb to a layer. The test prints the result of each attack.

mod attacks;
mod debs;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use builder::compose::{LayerInfo, PackageSet, TreeOrder};
use builder::sandbox::{self, Limits, Room};
use builder::worker;

use debs::{Deb, tools};

const SECRET: &str = "a secret of the host";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        [sandbox::WORKER, ids] => sandbox::worker(Some(ids.as_ref())).into(),
        [sandbox::INNER] => worker::inner().into(),
        [sandbox::IN_ROOT] => sandbox::enter().into(),
        ["attack", name, ref more @ ..] => attacks::run(name, more),
        _ => test(),
    }
}

fn test() -> ExitCode {
    let host = Host::new();
    let before = host.state();
    let mut table: Vec<(String, Result<String, String>)> = host.scripts();
    for attack in [Host::link, Host::hard_link, Host::planted_links, Host::image_links] {
        table.push(attack(&host));
    }
    table.extend(host.refused_packages());
    for attack in [Host::threads, Host::memory, Host::disk, Host::endless] {
        table.push(attack(&host));
    }
    let unchanged = if host.state() == before { Ok("same as before".to_owned()) } else { Err(host.state()) };
    table.push(("the host after all of them".to_owned(), unchanged));
    for (attack, result) in &table {
        let (word, detail) = match result {
            Ok(detail) => ("held", detail),
            Err(detail) => {
                eprintln!("{attack}:\n{detail}\n");
                ("BROKEN", detail)
            }
        };
        println!("{attack:<44} {word:<7} {}", detail.lines().last().unwrap_or_default());
    }
    let broken = table.iter().filter(|(_, result)| result.is_err()).count();
    println!("{} attacks, {broken} broke out", table.len());
    ExitCode::from(u8::from(broken > 0))
}

/// The build host, with files and sockets that no package may reach.
struct Host {
    place: PathBuf,
    dir: PathBuf,
    /// A world-writable folder.
    open: PathBuf,
    tools: Deb,
    tcp: TcpListener,
    _unix: UnixListener,
}

type Attack = (String, Result<String, String>);

impl Host {
    fn new() -> Self {
        let place = PathBuf::from(format!("/var/tmp/hostile-{}", std::process::id()));
        // The sandbox's ids have no access to the builder's folder, like root's home.
        let (dir, open) = (place.join("closed"), place.join("open"));
        for (folder, mode) in [(&place, 0o755), (&dir, 0o700), (&open, 0o777)] {
            fs::create_dir_all(folder).expect("a folder");
            fs::set_permissions(folder, fs::Permissions::from_mode(mode)).expect("a folder");
        }
        for name in ["secret", "shadow"] {
            fs::write(open.join(name), SECRET).expect("a file of the host");
        }
        let name = SocketAddr::from_abstract_name(Self::abstract_name()).expect("a name");
        Self {
            tools: tools(&dir.join("tools.deb")),
            tcp: TcpListener::bind("127.0.0.1:0").expect("a port"),
            _unix: UnixListener::bind_addr(&name).expect("a socket"),
            place,
            dir,
            open,
        }
    }

    fn abstract_name() -> String {
        format!("hostile-{}", std::process::id())
    }

    /// Returns the state of the host that the attacks must not change.
    fn state(&self) -> String {
        let read = |p: &str| fs::read_to_string(p).unwrap_or_default();
        let mut files: Vec<String> = fs::read_dir(&self.open)
            .expect("the open folder")
            .flatten()
            .map(|f| format!("{:?} {:?}", f.file_name(), fs::read_to_string(f.path())))
            .collect();
        files.sort();
        format!("{files:?} {}{}", read("/proc/sys/kernel/core_pattern"), read("/proc/sys/kernel/hostname"))
    }

    fn deb(&self, name: &str) -> Deb {
        Deb::new(&self.dir.join(format!("{name}.deb")), name)
    }

    fn limits() -> Limits {
        Limits { deadline: Duration::from_secs(120), disk_reserve: 0 }
    }

    /// Composes sets of packages in memory.
    fn compose(&self, sets: Vec<(Vec<&Deb>, bool)>) -> Result<LayerInfo, String> {
        let room = Room { ram: true, memory: 1 << 30 };
        self.compose_in(sets, room, Self::limits())
    }

    fn compose_in(&self, sets: Vec<(Vec<&Deb>, bool)>, room: Room, limits: Limits) -> Result<LayerInfo, String> {
        let work = self.dir.join("work");
        let _ = fs::remove_dir_all(&work);
        fs::create_dir_all(&work).expect("a folder to work in");
        let sets = sets.into_iter().enumerate().map(|(i, (debs, finish))| PackageSet {
            wheels: Vec::new(),
            packages: debs.into_iter().map(Deb::package).collect(),
            out: self.out(i),
            finish,
        });
        TreeOrder::new(sets.collect(), room, limits).compose(&work).map_err(|e| e.chain())
    }

    fn out(&self, stage: usize) -> PathBuf {
        self.dir.join(format!("out-{stage}"))
    }

    /// Returns a file of a composed tree.
    fn file(&self, stage: usize, path: &str) -> Option<String> {
        let tar = fs::File::open(self.out(stage).join("root.tar")).expect("a layer");
        let mut tar = tar::Archive::new(tar);
        let mut entries = tar.entries().expect("a tar").map(|e| e.expect("an entry"));
        let mut entry = entries.find(|e| e.path_bytes() == path.as_bytes())?;
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        Some(text)
    }

    /// Runs all attacks of [`attacks::ALL`] from one package's script.
    fn scripts(&self) -> Vec<Attack> {
        let secret = self.open.join("secret");
        let script = format!(
            "exec /usr/bin/attack attack all {} {} {}",
            secret.display(),
            self.tcp.local_addr().expect("an address").port(),
            Self::abstract_name()
        );
        let hostile = self.deb("hostile").postinst(&script).build();
        let done = self.compose(vec![(vec![&self.tools, &hostile], false)]);
        let lines = match done {
            Ok(_) => self.file(0, "usr/share/attack").unwrap_or_default(),
            Err(e) => return vec![("scripts".to_owned(), Err(e))],
        };
        let results: Vec<Attack> = lines
            .lines()
            .filter_map(|line| {
                let [word, attack, detail] = line.splitn(3, '\t').collect::<Vec<_>>()[..] else { return None };
                let detail = detail.to_owned();
                Some((attack.to_owned(), if word == "held" { Ok(detail) } else { Err(detail) }))
            })
            .collect();
        assert_eq!(results.len(), attacks::ALL.len(), "some attacks left no result:\n{lines}");
        results
    }

    /// Checks that the host's open folder has no new file.
    fn nothing_escaped(&self, done: &Result<LayerInfo, String>) -> Result<String, String> {
        let escaped = self.open.join("escaped");
        if fs::symlink_metadata(&escaped).is_ok() {
            let _ = fs::remove_file(&escaped);
            return Err(format!("{} was written", escaped.display()));
        }
        Ok(done.as_ref().map_or_else(Clone::clone, |_| "the file is in the tree".to_owned()))
    }

    /// One package has a link out of the tree, another one a file below that link.
    fn link(&self) -> Attack {
        let up = "../".repeat(30);
        let link = self
            .deb("link")
            .link("usr/absolute", self.open.to_str().expect("text"))
            .link("usr/relative", &format!("{up}{}", self.open.display()))
            .build();
        let below = self.deb("below").file("usr/absolute/escaped", "x").build();
        let mut done = self.compose(vec![(vec![&self.tools, &link], false), (vec![&below], false)]);
        let mut result = self.nothing_escaped(&done);
        if result.is_ok() {
            let below = self.deb("below").file("usr/relative/escaped", "x").build();
            done = self.compose(vec![(vec![&self.tools, &link], false), (vec![&below], false)]);
            result = self.nothing_escaped(&done);
        }
        ("unpack a file through a link out of the tree".to_owned(), result)
    }

    fn hard_link(&self) -> Attack {
        let link = self.deb("link").link("usr/absolute", self.open.to_str().expect("text")).build();
        let below = self.deb("below").hard_link("usr/stolen", "./usr/absolute/secret").build();
        let done = self.compose(vec![(vec![&self.tools, &link], false), (vec![&below], false)]);
        let result = match done {
            Ok(_) if self.file(1, "usr/stolen").as_deref() == Some(SECRET) => Err("the secret leaked".to_owned()),
            Ok(_) => Ok("another file".to_owned()),
            Err(e) => Ok(e),
        };
        ("unpack a hard link to a file of the host".to_owned(), result)
    }

    /// A script creates a link at a path that the builder writes afterwards.
    fn planted_links(&self) -> Attack {
        let script =
            format!("rm /var/lib/dpkg/diversions\nln -s {}/escaped /var/lib/dpkg/diversions", self.open.display());
        let planting = self.deb("planting").postinst(&script).build();
        let next = self.deb("next").file("usr/share/next", "x").build();
        let done = self.compose(vec![(vec![&self.tools, &planting], false), (vec![&next], false)]);
        ("plant a link where the builder writes".to_owned(), self.nothing_escaped(&done))
    }

    /// A script creates links at paths that the builder reads and rewrites when it finishes an image.
    fn image_links(&self) -> Attack {
        let open = self.open.display();
        let script = format!("rm -f /etc/shadow\nln -s {open}/shadow /etc/shadow\nln -s {open}/secret /boot/vmlinuz-1");
        let planting = self
            .deb("planting")
            .file("usr/lib/modules/1/x", "x")
            .file("boot/config-1", "x")
            .file("etc/x", "x")
            .postinst(&script)
            .build();
        let done = self.compose(vec![(vec![&self.tools, &planting], true)]);
        let kernel = fs::read_to_string(self.out(0).join("vmlinuz")).unwrap_or_default();
        let shadow = fs::read_to_string(self.open.join("shadow")).unwrap_or_default();
        let result = if kernel == SECRET {
            Err("the kernel is a file of the host".to_owned())
        } else if shadow != SECRET {
            Err("a file of the host was rewritten".to_owned())
        } else {
            done.map_or_else(Ok, |_| Err("an image without a kernel".to_owned()))
        };
        ("plant links where an image is finished".to_owned(), result)
    }

    fn refused_packages(&self) -> Vec<Attack> {
        let long = format!("usr/{}", "n".repeat(300));
        let debs = [
            ("unpack ../escaped", self.deb("up").file("../../../../../../../../escaped", "x").build(), "path"),
            ("unpack a block device", self.deb("device").device("usr/disk").build(), "device"),
            ("unpack a name of 300 bytes", self.deb("long").file(&long, "x").build(), "too long"),
        ];
        debs.iter()
            .map(|(attack, deb, word)| {
                let result = match self.compose(vec![(vec![&self.tools, deb], false)]) {
                    Err(e) if e.contains(word) => Ok(e),
                    Err(e) => Err(format!("another error: {e}")),
                    Ok(_) => Err("the package was unpacked".to_owned()),
                };
                ((*attack).to_owned(), result)
            })
            .collect()
    }

    /// Starts thousands of threads, which count against the limit of processes.
    fn threads(&self) -> Attack {
        let bomb = self.deb("bomb").postinst("exec /usr/bin/attack attack threads").build();
        let result = match self.compose(vec![(vec![&self.tools, &bomb], false)]) {
            Err(e) if e.contains("no more threads") => Ok(e),
            Err(e) => Err(e),
            Ok(_) => Err("8000 threads".to_owned()),
        };
        ("a fork bomb".to_owned(), result)
    }

    fn memory(&self) -> Attack {
        let mut result = Ok(String::new());
        for folder in ["/usr/share", "/tmp", "/run"] {
            let filling = self.deb("filling").postinst(&format!("exec /usr/bin/attack attack fill {folder}")).build();
            let room = Room { ram: true, memory: 400 << 20 };
            result = match self.compose_in(vec![(vec![&self.tools, &filling], false)], room, Self::limits()) {
                Err(e) if e.contains("No space left") => Ok(e),
                Err(e) => Err(e),
                Ok(_) => Err(format!("1 GB below {folder}")),
            };
            if result.is_err() {
                break;
            }
        }
        ("fill the memory with files".to_owned(), result)
    }

    fn disk(&self) -> Attack {
        let filling = self.deb("filling").postinst("exec /usr/bin/attack attack fill /usr/share").build();
        let free = nix::sys::statvfs::statvfs(&self.dir).map_or(0, |s| s.blocks_available() * s.fragment_size());
        let limits = Limits { disk_reserve: free.saturating_sub(300 << 20), ..Self::limits() };
        let room = Room { ram: false, memory: 1 << 30 };
        let result = match self.compose_in(vec![(vec![&self.tools, &filling], false)], room, limits) {
            Err(e) if e.contains("fills the disk") => Ok(e),
            Err(e) => Err(e),
            Ok(_) => Err("1 GB on the disk".to_owned()),
        };
        ("fill the disk".to_owned(), result)
    }

    fn endless(&self) -> Attack {
        let endless = self.deb("endless").postinst("while :; do :; done").build();
        let limits = Limits { deadline: Duration::from_secs(4), ..Self::limits() };
        let room = Room { ram: true, memory: 1 << 30 };
        let result = match self.compose_in(vec![(vec![&self.tools, &endless], false)], room, limits) {
            Err(e) if e.contains("does not end") => Ok(e),
            Err(e) => Err(e),
            Ok(_) => Err("the script ended".to_owned()),
        };
        ("a script without an end".to_owned(), result)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::env::var_os("KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.place);
        }
    }
}

/// Returns the libraries of a program, as the dynamic loader finds them.
fn libraries(program: &Path) -> BTreeMap<String, PathBuf> {
    let listed = std::process::Command::new("ldd").arg(program).output().expect("ldd");
    String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(|path| (debs::merged(path), PathBuf::from(path)))
        .collect()
}
