//! What a hub's real HAProxy does with logins and cookies: its configuration of the images, in a network namespace, in
//! front of a server that replies as Odoo does. Needs root, haproxy and python3.

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::root;
use fleet::{Fleet, Issuer, MachineSize, NodeContext, PrivateKey, Secrets, Tls, Topology};

/// Redirects after a login, and shows the form again after one with the password `bad`.
const ODOO: &str = r"
import http.server
class Odoo(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def reply(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        is_login = self.command == 'POST' and self.path.endswith('/web/login')
        self.send_response(303 if is_login and b'bad' not in body else 200)
        for cookie in ('session_id=x; HttpOnly; Path=/', 'lang=en; Secure; SameSite=None', 'secure_x=1; samesite=Strict'):
            self.send_header('Set-Cookie', cookie)
        self.send_header('X-Seen', self.headers.get('X-Forwarded-Proto', ''))
        self.send_header('Content-Length', '0')
        self.end_headers()
    do_GET = do_POST = reply
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(('127.0.0.20', 8069), Odoo).serve_forever()
";

/// Prints what clients of several addresses see, one line each.
const CLIENTS: &str = r#"
import collections, http.client, socket, ssl
context = ssl._create_unverified_context()
def ask(source, path, body=None, cookie=''):
    c = http.client.HTTPSConnection('127.0.0.1', 443, context=context, source_address=(source, 0), timeout=20)
    headers = {'Host': 'erp.example.com', 'Content-Type': 'application/x-www-form-urlencoded', 'Cookie': cookie}
    c.request('POST' if body is not None else 'GET', path, body, headers)
    r = c.getresponse()
    text = r.read().decode()
    c.close()
    return r, text
def count(n, *args):
    return dict(collections.Counter(ask(*args)[0].status for _ in range(n)))
print('office', count(100, '127.0.0.30', '/web/login', 'good'))
print('guesses', count(40, '127.0.0.31', '/en/web/login', 'bad'))
print('page', ask('127.0.0.31', '/web/login')[0].status)
print('encoded', count(1, '127.0.0.31', '/web/lo%67in', 'good'))
print('sessions', count(130, '127.0.0.32', '/web/session/authenticate', '{}'))
print('json', count(130, '127.0.0.33', '/jsonrpc', '{"params": {"service": "common", "method": "login"}}'))
print('escaped', count(130, '127.0.0.34', '/jsonrpc', '{"params": {"service": "c\\u006fmmon"}}'))
print('xml', count(130, '127.0.0.35', '/xmlrpc/2/common', '<methodCall/>'))
print('objects', count(200, '127.0.0.36', '/jsonrpc', '{"params": {"service": "object", "args": ["login", "\\u00e9"]}}'))
anna, guess, nat = 'login=anna&password=good', 'login=anna&password=bad', '127.0.0.40'
r, _ = ask(nat, '/web/login', anna)
given = [value for value in r.msg.get_all('Set-Cookie') if value.startswith('BAKEHOUSE_DEVICE=')]
print('device', given[0].split(';', 1)[1].strip())
device = 'lang=en; ' + given[0].split(';')[0]
print('attacker', count(40, nat, '/web/login', guess))
print('other browser', count(1, nat, '/web/login', anna))
print('forged', count(1, nat, '/web/login', anna, 'BAKEHOUSE_DEVICE=00000000-0000-4000-8000-000000000000'))
print('other user', count(1, nat, '/web/login', 'login=bob&password=good', device))
print('known', count(3, nat, '/web/login', anna, device))
print('known guesses', count(7, nat, '/web/login', guess, device))
print('no device', *[v for v in ask(nat, '/web/login')[0].msg.get_all('Set-Cookie') if 'DEVICE' in v])
r, text = ask('127.0.0.35', '/xmlrpc/2/common', '<methodCall/>')
print('refusal', r.status, r.getheader('Retry-After'), text.strip())
r, _ = ask('127.0.0.37', '/web')
print('cookies', *sorted(r.msg.get_all('Set-Cookie')), sep=' | ')
print('seen', r.getheader('X-Seen'), r.getheader('Strict-Transport-Security'))
"#;

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn logins_are_limited_by_address_and_known_browsers_still_log_in() {
    in_own_network(async {
        let toml =
            b"name = \"acme\"\n[web]\nname = \"erp.example.com\"\n[groups.hub]\ncount = 1\nendpoints = [\"h\"]\n\
                     [groups.app]\ncount = 1\n";
        let mut topology = Topology::from_fleet(&Fleet::parse("fleet.toml", toml).expect("a fleet"));
        for node in topology.nodes.iter_mut().chain(&mut topology.hubs) {
            node.address = if node.hub > 0 { [127, 0, 0, 1] } else { [127, 0, 0, 20] }.into();
        }
        let dir = tempfile::tempdir().expect("a folder");
        let hub = topology.hubs[0].clone();
        let (authority, key) = (Issuer::root("acme").expect("randomness"), PrivateKey::generate().expect("randomness"));
        let issuer = authority.issuer("acme", "hub-1").expect("a root");
        let cert = issuer.node(&topology, &hub, &key.public().expect("a key")).expect("an issuer");
        fs::create_dir(dir.path().join("tls")).expect("a folder");
        fs::write(dir.path().join("tls/ca.crt"), authority.certificate()).expect("a folder");
        for name in ["web.pem", "node.pem"] {
            fs::write(dir.path().join("tls").join(name), format!("{cert}{}", key.pem())).expect("a folder");
        }
        let template = "overlays/haproxy/run/bakehouse/haproxy.cfg.j2";
        let text = fs::read_to_string(root().join(template)).expect("the template exists");
        let context = NodeContext {
            fleet: &topology,
            node: &hub,
            epoch: 1,
            machine: MachineSize { memory: 1024, var: 1024, cpus: 2, timeout_scale: 1 },
            tls: &Tls { ca: String::new(), cert: String::new(), key: String::new(), etcd_clients: String::new() },
            secrets: &Secrets::sample(),
            web: "",
            lan: &[],
        };
        let text = fleet::render(template, &text, &context).expect("a valid template");
        let file = dir.path().join("haproxy.cfg");
        fs::write(&file, text.replace("/run/bakehouse", dir.path().to_str().expect("UTF-8"))).expect("a folder");
        let _odoo = Running(Command::new("python3").args(["-c", ODOO]).stderr(Stdio::null()).spawn().expect("python3"));
        let haproxy = Command::new("haproxy").arg("-db").arg("-f").arg(&file).spawn();
        let _haproxy = Running(haproxy.expect("haproxy is installed"));
        let begun = Instant::now();
        while TcpStream::connect("127.0.0.1:443").is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "HAProxy does not start");
            std::thread::sleep(Duration::from_millis(100));
        }
        // Two health checks.
        std::thread::sleep(Duration::from_secs(4));
        let done = Command::new("python3").args(["-c", CLIENTS]).output().expect("python3");
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        let errors = String::from_utf8_lossy(&done.stderr).into_owned();
        let expected = "\
office {303: 100}
guesses {200: 30, 429: 10}
page 200
encoded {429: 1}
sessions {200: 120, 429: 10}
json {200: 120, 429: 10}
escaped {200: 120, 429: 10}
xml {200: 120, 429: 10}
objects {200: 200}
device Path=/; Max-Age=2073600; HttpOnly; Secure; SameSite=Lax
attacker {200: 30, 429: 10}
other browser {429: 1}
forged {429: 1}
other user {429: 1}
known {303: 3}
known guesses {200: 5, 429: 2}
no device
refusal 429 300 Too many attempts to log in from this address. Try again in 5 minutes.
cookies | BAKEHOUSE=app-1; path=/; HttpOnly; Secure; SameSite=Lax | lang=en; Secure; SameSite=None | secure_x=1; \
samesite=Strict; Secure | session_id=x; HttpOnly; Path=/; Secure; SameSite=Lax
seen https max-age=31536000
";
        assert_eq!(text, expected, "{errors}");
    });
}
