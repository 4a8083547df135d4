//! SQL of operators: the node API with this host's PostgreSQL, whose rules and users are those of a database node. Needs
//! root, initdb, postgres and psql, and the user `postgres`.

use std::fs::{self, Permissions};
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bakehouse_tests::root;
use builder::keys::authority::FleetKey;
use builder::project::Project;
use firstboot::api::{self, NodeApi, Tasks};
use firstboot::host::dbus::Phase;
use firstboot::node::drained::DrainState;
use firstboot::node::outbox::Outbox;
use firstboot::node::revocations::Revocations;
use fleet::node_api::{DrainAnswer, ExecEvent, NODE_API_PORT, SQL_PATH, SqlRequest};
use fleet::postgres::{Messages, PROTOCOL_3, Report, kind, query, report, row, startup, text};
use fleet::{Issuer, Operator, OperatorRole, PrivateKey, Topology, UpdateDecision, encoding};
use fleet_https::{Connection, Identity, request};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

const LIMIT: Duration = Duration::from_secs(60);

/// PostgreSQL of this host, with the rules of `patroni.yml`.
struct Postgres {
    server: Child,
    dir: tempfile::TempDir,
    programs: PathBuf,
    user: nix::unistd::User,
}

impl Postgres {
    fn start(project: &Project) -> Self {
        let versions = fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL is installed");
        let mut versions: Vec<PathBuf> = versions.map(|entry| entry.expect("a folder").path().join("bin")).collect();
        versions.sort();
        let programs = versions.pop().expect("PostgreSQL is installed");
        let user = nix::unistd::User::from_name("postgres").expect("users").expect("the user postgres");
        let dir = tempfile::tempdir().expect("a folder");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("own folder");
        for name in ["data", "run"] {
            let path = dir.path().join(name);
            fs::create_dir(&path).expect("own folder");
            chown(&path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("root");
        }
        let data = dir.path().join("data");
        let of_user = |program: &str| {
            let mut command = Command::new(programs.join(program));
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).current_dir("/");
            command
        };
        let mut initdb = of_user("initdb");
        initdb.arg("-D").arg(&data).args(["--no-sync", "--encoding=UTF8", "--locale=C.UTF-8", "--auth-local=peer"]);
        assert!(initdb.stdout(Stdio::null()).status().expect("initdb").success());
        for (key, file) in [("pg_hba", "pg_hba.conf"), ("pg_ident", "pg_ident.conf")] {
            let lines: Vec<String> = rules(project, key).into_iter().filter(|l| !l.starts_with("hostssl")).collect();
            fs::write(data.join(file), lines.join("\n") + "\n").expect("own folder");
        }
        let log = fs::File::create(dir.path().join("log")).expect("own folder");
        let socket = format!("unix_socket_directories={}", dir.path().join("run").display());
        let mut server = of_user("postgres");
        server.arg("-D").arg(&data).args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", &socket]);
        server.args(["-c", "log_line_prefix=%u@%d "]).stderr(log);
        let server = server.spawn().expect("postgres");
        let started = Self { server, dir, programs, user };
        let begun = Instant::now();
        while started.psql("postgres", &["-c", "select 1"]).is_none() {
            assert!(begun.elapsed() < LIMIT, "PostgreSQL does not start: {}", started.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        started
    }

    /// Runs psql as the superuser. Returns its output; `None` if it fails.
    fn psql(&self, database: &str, args: &[&str]) -> Option<String> {
        let mut psql = Command::new(self.programs.join("psql"));
        psql.uid(self.user.uid.as_raw()).gid(self.user.gid.as_raw()).current_dir("/").arg("-h").arg(self.folder());
        psql.args(["-XAtq", "--set=ON_ERROR_STOP=1", "-d", database]).args(args);
        let done = psql.stderr(Stdio::null()).output().expect("psql");
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    fn socket(&self) -> PathBuf {
        self.folder().join(".s.PGSQL.5432")
    }

    fn log(&self) -> String {
        let mut log = String::new();
        fs::File::open(self.dir.path().join("log"))
            .and_then(|mut file| file.read_to_string(&mut log))
            .expect("the log");
        log
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.server.id()).expect("a pid"));
        // A fast shutdown: sessions end.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
        let _ = self.server.wait();
    }
}

/// Returns the lines of a list in the `patroni.yml` of the first database node.
fn rules(project: &Project, key: &str) -> Vec<String> {
    let node = project.topology.nodes.iter().find(|node| node.has_role("db")).expect("a database node");
    let authority = FleetKey::create(&project.topology.name).expect("an authority");
    let member = authority.membership(&project.topology, node).expect("a member");
    let overlay = project.overlay("patroni").expect("the overlay exists");
    let (name, template) = overlay.files.iter().find(|(name, _)| name.ends_with("patroni.yml.j2")).expect("a template");
    let template = String::from_utf8_lossy(template);
    let rendered = fleet::render(name, &template, &project.context(node, &member)).expect("a valid template");
    let lines = rendered.lines().skip_while(|line| line.trim() != format!("{key}:")).skip(1);
    lines.map_while(|line| line.strip_prefix("    - ")).map(str::to_owned).collect()
}

/// An admin of a database node.
struct Site {
    postgres: Postgres,
    root: Issuer,
    node: String,
    /// Address of the node. Each test has its own.
    address: Ipv4Addr,
    _revocations: tempfile::TempDir,
}

impl Site {
    fn start(number: u8) -> Self {
        let address = Ipv4Addr::new(127, 77, 0, number);
        let mut project = Project::load(&root().join("profiles/fleets/ha.toml")).expect("a valid fleet.toml");
        assert_eq!(rules(&project, "pg_ident"), [""; 0], "without the switch, PostgreSQL admits no operator");
        assert!(!rules(&project, "pg_hba").iter().any(|rule| rule.contains("bakehouse_")));
        project.topology.access.sql = true;
        let postgres = Postgres::start(&project);
        let prepared = [
            ("postgres", "create role odoo login createdb password 'secret'"),
            ("postgres", "create database odoo owner odoo"),
            ("odoo", "set role odoo; create table t (a int); insert into t values (1)"),
        ];
        for (database, sql) in prepared {
            postgres.psql(database, &["-c", sql]).expect("it succeeds");
        }
        let users = root().join("overlays/patroni/usr/share/bakehouse/operators.sql");
        // The primary runs it more than once. psql of the user `postgres` cannot read a checkout of root.
        let copy = postgres.dir.path().join("operators.sql");
        fs::copy(users, &copy).expect("own folder");
        fs::set_permissions(&copy, Permissions::from_mode(0o644)).expect("own file");
        for _ in 0..2 {
            postgres.psql("postgres", &["-f", &copy.display().to_string()]).expect("it succeeds");
        }
        let dir = tempfile::tempdir().expect("a folder");
        let (root, node) = serve(project.topology, address, postgres.socket(), dir.path());
        Self { postgres, root, node, address, _revocations: dir }
    }

    async fn admin(&self) -> Connection {
        let key = PrivateKey::generate().expect("a key");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        let operator = Operator::new("anna", OperatorRole::Admin).expect("a name");
        let cert = self.root.operator(&operator, &key.public().expect("a key"), (now - 60, now + 3600));
        let cert = cert.expect("a certificate");
        let own = Identity { cert: &cert, key: key.pem() };
        let tls = fleet_https::client(self.root.certificate(), Some(own)).expect("a certificate");
        Connection::open(&self.address.to_string(), NODE_API_PORT, &self.node, &tls).await.expect("the node answers")
    }

    /// Runs SQL, and returns the answer. Each `|` separates values, and each line is a row, a tag or data.
    async fn sql(&self, write: bool, sql: &str) -> Result<String, Box<Report>> {
        let asked = SqlRequest { sql: sql.to_owned(), write, seconds: 20, ..SqlRequest::default() };
        self.ask(&asked).await.unwrap_or_else(|why| panic!("{sql}: {why}"))
    }

    async fn ask(&self, asked: &SqlRequest) -> Result<Result<String, Box<Report>>, String> {
        let mut connection = self.admin().await;
        let body = serde_json::to_vec(asked).expect("JSON").into();
        let request = request("POST", "node", SQL_PATH, &[], body).expect("a request");
        let lines = connection.lines(request, LIMIT).await.map_err(|e| fleet::ErrorChain::new(&e).to_string());
        let (mut lines, mut answer) = (lines?, Answer::default());
        while let Some(line) = timeout(LIMIT, lines.next()).await.expect("a line in time").expect("a line") {
            match serde_json::from_slice(&line).expect("an event") {
                ExecEvent::Stdout(part) => answer.feed(&encoding::decode(&part).expect("base64")),
                ExecEvent::Exit(0) => return Ok(answer.result()),
                other => return Err(format!("{other:?}")),
            }
        }
        panic!("the reply has no end")
    }

    /// Waits until no backend runs a statement with this text.
    async fn until_no_backend(&self, part: &str) {
        let count = format!(
            "select count(*) from pg_stat_activity where query like '%{part}%' and state = 'active' and pid <> \
             pg_backend_pid()"
        );
        let begun = Instant::now();
        while self.postgres.psql("odoo", &["-c", &count]).as_deref() != Some("0") {
            assert!(begun.elapsed() < Duration::from_secs(8), "a backend still runs {part}");
            sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Serves the API of a database node. Returns the fleet's root, and the node's name.
fn serve(mut topology: Topology, address: Ipv4Addr, socket: PathBuf, dir: &Path) -> (Issuer, String) {
    let root = Issuer::root(&topology.name).expect("a root");
    let node = topology.nodes.iter_mut().find(|node| node.has_role("db")).expect("a database node");
    node.address = address;
    let node = node.clone();
    let key = PrivateKey::generate().expect("a key");
    let cert = root.node(&topology, &node, &key.public().expect("a key")).expect("a certificate");
    let own = Identity { cert: &cert, key: key.pem() };
    let name = node.name.clone();
    let api = NodeApi {
        revocations: Arc::new(Revocations::load(dir, &topology.name, root.certificate())),
        topology,
        node,
        image: "7".to_owned(),
        epoch: 1,
        root: root.certificate().to_owned(),
        tls: fleet_https::client(root.certificate(), Some(own)).expect("a certificate"),
        phase: watch::Sender::new(Phase::Ready).subscribe(),
        bus: Some("unix:path=/nonexistent".to_owned()),
        journal: dir.join("journal.sock"),
        postgres: socket,
        locker: Box::new(|_| Box::pin(async { Ok(UpdateDecision { granted: true, why: String::new() }) })),
        outbox: Arc::new(Outbox::load(dir, &name, Box::new(|_| Box::pin(async { Ok(()) })))),
        drained: Arc::new(DrainState::load(dir, &dir.join("run"))),
        drainer: Box::new(|_| Box::pin(async { Ok(DrainAnswer { granted: true, ..DrainAnswer::default() }) })),
        tasks: Tasks::default(),
    };
    let server = fleet_https::mutual_server(root.certificate(), own).expect("a certificate");
    tokio::spawn(api::keep(Arc::new(api), server));
    while std::net::TcpStream::connect((address, NODE_API_PORT)).is_err() {
        std::thread::sleep(Duration::from_millis(10));
    }
    (root, name)
}

/// What PostgreSQL has answered.
struct Answer {
    messages: Messages,
    text: String,
    error: Option<Report>,
    is_ready: bool,
}

impl Default for Answer {
    fn default() -> Self {
        Self { messages: Messages::new(1 << 20), text: String::new(), error: None, is_ready: false }
    }
}

impl Answer {
    fn feed(&mut self, bytes: &[u8]) {
        self.messages.feed(bytes);
        for message in self.messages.take().expect("messages") {
            let line = match message.kind {
                kind::ROW => {
                    let values = row(&message.body).expect("a row").into_iter();
                    values.map(Option::unwrap_or_default).collect::<Vec<_>>().join("|")
                }
                kind::COMPLETE => text(&message.body),
                kind::COPY_DATA => String::from_utf8_lossy(&message.body).trim_end().to_owned(),
                kind::ERROR => {
                    self.error = Some(report(&message.body));
                    continue;
                }
                kind::READY => {
                    self.is_ready = true;
                    continue;
                }
                _ => continue,
            };
            self.text += &format!("{line}\n");
        }
    }

    fn result(self) -> Result<String, Box<Report>> {
        self.error.map_or(Ok(self.text), |report| Err(Box::new(report)))
    }

    /// Reads until PostgreSQL waits for a query, or ends the session.
    async fn read(mut self, from: &mut (impl AsyncRead + Unpin)) -> Result<String, Box<Report>> {
        let mut buffer = vec![0; 1 << 12];
        while !self.is_ready && self.error.is_none() {
            let read = timeout(LIMIT, from.read(&mut buffer)).await.expect("an answer");
            let Some(count) = read.ok().filter(|count| *count > 0) else { break };
            self.feed(&buffer[..count]);
        }
        self.result()
    }
}

/// Begins a session as a client does that calls itself `user`, and returns its current user.
async fn current_user(mut stream: impl AsyncRead + AsyncWrite + Unpin, user: &str) -> Result<String, Box<Report>> {
    let parameters = [("user", user), ("database", "odoo")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    stream.write_all(&startup(PROTOCOL_3, &parameters)).await.expect("a stream");
    Answer::default().read(&mut stream).await?;
    stream.write_all(&query("select session_user, current_user")).await.expect("a stream");
    Answer::default().read(&mut stream).await
}

fn code(answer: Result<String, Box<Report>>) -> String {
    match answer {
        Ok(text) => panic!("no error: {text}"),
        Err(report) => report.code,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_read_and_write_as_users_without_further_rights() {
    let site = Site::start(1);
    assert_eq!(site.sql(false, "select 1, 'ü'; select a from t").await.unwrap(), "1|ü\nSELECT 1\n1\nSELECT 1\n");
    assert_eq!(site.sql(false, "copy t to stdout").await.unwrap(), "1\nCOPY 1\n");
    for (sql, expected) in [
        ("create table x (a int)", "25006"),
        ("begin read write; insert into t values (2)", "42501"),
        ("begin read write; create table x (a int)", "42501"),
        ("set role odoo", "42501"),
        ("set log_statement = 'none'", "42501"),
        ("copy t to program 'id'", "42501"),
        ("select pg_read_file('/etc/passwd')", "42501"),
        ("select no_such_column from t", "42703"),
    ] {
        assert_eq!(code(site.sql(false, sql).await), expected, "{sql}");
    }
    // Odoo can change later what an operator creates.
    let created = "create table x (a int); select tableowner from pg_tables where tablename = 'x'; drop table x";
    assert_eq!(site.sql(true, created).await.unwrap(), "CREATE TABLE\nodoo\nSELECT 1\nDROP TABLE\n");
    assert_eq!(site.sql(true, "insert into t values (2)").await.unwrap(), "INSERT 0 1\n");
    // Several statements are one transaction.
    assert_eq!(code(site.sql(true, "insert into t values (3); select 1 / 0").await), "22012");
    assert_eq!(site.sql(false, "select max(a) from t").await.unwrap(), "2\nSELECT 1\n");
    for (sql, expected) in [
        ("create role evil superuser", "42501"),
        ("copy t to program 'id'", "42501"),
        ("select rolpassword from pg_authid", "42501"),
        ("copy t from stdin", "57014"),
    ] {
        assert_eq!(code(site.sql(true, sql).await), expected, "{sql}");
    }
    let log = site.postgres.log();
    for line in
        ["bakehouse_reader@odoo LOG:  statement: select 1, 'ü'", "bakehouse_writer@odoo LOG:  statement: create"]
    {
        assert!(log.contains(line), "{log}");
    }
    let missing =
        SqlRequest { sql: "select 1".to_owned(), seconds: 5, database: Some("none".to_owned()), write: false };
    let why = site.ask(&missing).await.unwrap_err();
    assert!(why.contains("does not exist (3D000)") && why.contains("--database postgres"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_ends_with_its_time_limit_and_with_its_operator() {
    let site = Site::start(2);
    let asked = |sql: &str, seconds| SqlRequest { sql: sql.to_owned(), seconds, ..SqlRequest::default() };
    let begun = Instant::now();
    assert_eq!(code(site.ask(&asked("select pg_sleep(50), 'limit'", 1)).await.unwrap()), "57014");
    // A session that turns PostgreSQL's own limit off has the node's.
    let longer = asked("set statement_timeout = 0; select pg_sleep(50), 'off'", 1);
    let why = site.ask(&longer).await.unwrap_err();
    assert!(why.contains("time limit of 1 s: cancelled"), "{why}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let sleeping = asked("select pg_sleep(50), 'gone'", 60);
    assert!(timeout(Duration::from_secs(2), site.ask(&sleeping)).await.is_err());
    for part in ["limit", "off", "gone"] {
        site.until_no_backend(part).await;
    }
    // The same for a client of `open postgres`, which sends no cancel request.
    let mut stream = site.admin().await.stream("/v1/open/postgres").await.expect("a stream");
    stream.write_all(&startup(PROTOCOL_3, &[("user".to_owned(), "x".to_owned())])).await.expect("a stream");
    Answer::default().read(&mut stream).await.expect("a session");
    stream.write_all(&query("select pg_sleep(50), 'open'")).await.expect("a stream");
    stream.flush().await.expect("a stream");
    sleep(Duration::from_secs(1)).await;
    drop(stream);
    site.until_no_backend("open").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_has_the_operators_user_whatever_it_asks_for() {
    let site = Site::start(3);
    for (service, expected) in
        [("postgres", "bakehouse_reader|bakehouse_reader"), ("postgres-write", "bakehouse_writer|odoo")]
    {
        for user in ["postgres", "odoo", "bakehouse_writer"] {
            let stream = site.admin().await.stream(&format!("/v1/open/{service}")).await.expect("a stream");
            assert_eq!(current_user(stream, user).await.unwrap(), format!("{expected}\nSELECT 1\n"), "{user}");
        }
    }
    // PostgreSQL's own rules: root is no superuser and not Odoo, and no other user is an operator.
    let direct = |user: &'static str| {
        let socket = site.postgres.socket();
        async move { current_user(UnixStream::connect(socket).await.expect("the socket"), user).await }
    };
    assert_eq!(code(direct("postgres").await), "28000");
    assert!(direct("bakehouse_reader").await.is_ok());
    assert_eq!(site.postgres.psql("odoo", &["-U", "bakehouse_reader", "-c", "select 1"]), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_reader_cannot_fill_the_disk_with_temporary_files() {
    let site = Site::start(9);
    assert_eq!(site.sql(false, "show temp_file_limit").await.unwrap(), "1GB\nSHOW\n");
    // Insufficient privilege.
    assert_eq!(code(site.sql(false, "set temp_file_limit = '2GB'").await), "42501");
}
