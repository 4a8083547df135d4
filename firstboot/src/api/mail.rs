//! A test mail of Odoo. systemd runs `odoo-mail` in a service of its own, as the user and in the sandbox of Odoo's other
//! services, so that the mail takes the way of all mails of this node.

use std::sync::Arc;

use fleet::node_api::{MAIL_TEST_SECONDS, MailTestRequest, is_mail_address};
use hyper::StatusCode;

use super::exec::{self, Job};
use super::listener::Client;
use super::odoo_shell::{CREDENTIAL, properties, runs_odoo};
use super::reply::{Answer, Refusal};

const PYTHON: &str = "/usr/bin/python3";
/// The script of the overlay `odoo`.
const PROGRAM: &str = "/usr/lib/bakehouse/odoo-mail";

/// Sends a mail, and returns the output of the script while it runs.
pub(super) async fn test(client: &Arc<Client>, asked: &MailTestRequest) -> Answer {
    runs_odoo(client)?;
    if !is_mail_address(&asked.to) {
        let help = "write it as name@host, without a name in front of it";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, "the request has no mail address").help(help));
    }
    let service = exec::service_name("mail-test")?;
    let what = format!("mail test to {}", asked.to);
    let job = Job {
        words: words(&service, &asked.to),
        seconds: MAIL_TEST_SECONDS,
        begins: what.clone(),
        ends: what,
        service,
        input: Vec::new(),
        properties: properties(),
    };
    exec::stream(client, job).await
}

fn words(service: &str, to: &str) -> Vec<String> {
    let config = format!("/run/credentials/{service}/{CREDENTIAL}");
    [PYTHON, PROGRAM, &config, to].map(str::to_owned).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_gets_the_credential_and_the_address() {
        let overlay = include_str!("../../../overlays/odoo/overlay.toml");
        assert!(overlay.contains(&format!("[files.\"{}\"]\nmode = \"0755\"", PROGRAM.trim_start_matches('/'))));
        assert_eq!(
            words("x.service", "a@acme.example"),
            [PYTHON, PROGRAM, "/run/credentials/x.service/odoo.conf", "a@acme.example"]
        );
    }
}
