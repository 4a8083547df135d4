//! `bakehouse mail test`: sends a mail as Odoo sends mail.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::{Args, Subcommand};
use fleet::node_api::{ExecEvent, MAIL_TEST_PATH, MailReport, MailTestRequest, is_mail_address};
use fleet::one_line;
use schemars::JsonSchema;
use serde::Serialize;

use super::access::NodeContext;
use super::odoo::app_node;
use super::results::CommandResult;
use super::steer::IDLE;
use super::verbs::AccessArgs;
use crate::deploy::nodes::{self, NodeLines};
use crate::error::{Error, Result, fail};
use crate::util::terminal::visible;

pub(super) const MAIL: &str = "\
Example:
  bakehouse mail test anna@example.com";

/// Longest output of the node's script that is read, in bytes.
const LONGEST: usize = 1 << 20;

#[derive(Subcommand)]
pub(super) enum MailCommand {
    /// Send a test mail, and print what the mail server answers
    #[command(after_help = "Examples:\n  bakehouse mail test anna@example.com\n  \
        bakehouse mail test anna@example.com app-2 --json\n\n\
        An app node sends the mail as Odoo sends mail: by the server of [odoo.mail], or by one of Odoo's own settings.\n\
        The command prints the answer of the mail server word for word, and the fix. It needs the role operator. The\n\
        exit code is 1 if the mail server has not accepted the mail.")]
    Test(MailTestArgs),
}

#[derive(Args)]
pub(super) struct MailTestArgs {
    /// Address of the recipient
    pub(super) address: String,
    /// Name of an app node; default: the first one that works
    pub(super) node: Option<String>,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Result of `mail test`.
#[derive(Serialize, JsonSchema)]
pub(super) struct MailTestResult {
    /// Node that sent the mail.
    pub(super) node: String,
    /// What the mail server answered.
    #[serde(flatten)]
    pub(super) report: MailReport,
    /// The fix; `None` if the server has accepted the mail.
    pub(super) help: Option<String>,
}

impl MailTestResult {
    /// Whether the mail server has accepted the mail.
    pub(super) fn is_good(&self) -> bool {
        self.report.step.is_empty()
    }
}

impl fmt::Display for MailTestResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MailReport { server, name, sender, to, message, step, .. } = &self.report;
        let server = match (server.as_str(), name.as_str()) {
            ("", _) => "Odoo".to_owned(),
            (server, "") => visible(server),
            (server, name) => format!("{} (`{}` in Odoo's settings)", visible(server), visible(name)),
        };
        let (sender, to) = (visible(sender), visible(to));
        if self.is_good() {
            return writeln!(f, "{}: {server} has accepted a mail from {sender} to {to}", self.node);
        }
        writeln!(
            f,
            "{}: {server} has not accepted a mail to {to} ({}): {}",
            self.node,
            visible(step),
            visible(message)
        )?;
        self.help.as_ref().map_or(Ok(()), |help| writeln!(f, "  help: {help}"))
    }
}

/// Runs a command of `bakehouse mail`.
pub(super) fn run(context: &NodeContext, command: &MailCommand) -> Result<CommandResult> {
    let MailCommand::Test(args) = command;
    if !is_mail_address(&args.address) {
        let text = format!("`{}` is not a mail address\n  help: write it as name@host", args.address.escape_debug());
        return Err(Error::Usage(text));
    }
    let reach = context.reach(&args.access)??;
    let node = match &args.node {
        Some(node) => reach.node(node)?.name.clone(),
        None => app_node(&reach)?,
    };
    context.progress.say("mail", &format!("{node} sends a mail to {}", args.address));
    let request = MailTestRequest { to: args.address.clone() };
    let (status, output) = nodes::run(async {
        let body = serde_json::to_vec(&request).map_err(Error::Json)?.into();
        let lines = reach.client.connect(&node).await?.lines("POST", MAIL_TEST_PATH, body, IDLE).await?;
        collect(&node, lines).await
    })??;
    let Some(report) = report(&output) else {
        let last = output.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        let log = format!("help: `bakehouse logs {node} -u odoo-http` has Odoo's errors");
        return fail(format!("{node}: the test ended with the exit code {status}: {}\n  {log}", one_line(last)));
    };
    let help = help(&report);
    Ok(CommandResult::MailTest(MailTestResult { node, report, help }))
}

/// Returns the exit code and the output of the node's script.
async fn collect(node: &str, mut lines: NodeLines) -> Result<(i32, String)> {
    let mut all = Vec::new();
    let invalid = || format!("read the answer of {node}");
    while let Some(line) = lines.next().await? {
        let text = match serde_json::from_slice(&line).map_err(Error::cannot(invalid()))? {
            ExecEvent::Exit(status) => return Ok((status, String::from_utf8_lossy(&all).into_owned())),
            ExecEvent::Stdout(text) | ExecEvent::Stderr(text) => text,
            ExecEvent::Failed(why) => return fail(format!("{node}: {}", one_line(&why))),
            ExecEvent::Unknown => continue,
        };
        let bytes = BASE64.decode(text).map_err(Error::cannot(invalid()))?;
        all.extend(&bytes[..bytes.len().min(LONGEST.saturating_sub(all.len()))]);
    }
    fail(format!("the connection to {node} ended before the test: the mail may have been sent"))
}

/// Returns the report in a script's output, which also has Odoo's log.
fn report(output: &str) -> Option<MailReport> {
    let objects = output.lines().rev().filter(|line| line.starts_with('{'));
    let mut found = objects.filter_map(|line| serde_json::from_str::<MailReport>(line).ok());
    found.find(|report| !report.to.is_empty())
}

/// Returns the fix of a failure.
fn help(report: &MailReport) -> Option<String> {
    let odoo = "Settings, Technical, Outgoing Mail Servers";
    let in_odoo = report.source == "odoo";
    let of = |in_fleet: &str, setting: &str| {
        if in_odoo { format!("correct {setting} in Odoo: {odoo}") } else { in_fleet.to_owned() }
    };
    let rollout = "raise `version`, and publish";
    let text = match report.step.as_str() {
        "" => return None,
        "no_server" => format!("add `[odoo.mail]` with `smarthost` to fleet.toml, {rollout}"),
        "no_sender" => format!("set `from` in `[odoo.mail]`, {rollout}"),
        "name" => of("make sure that app nodes resolve the host of `smarthost` in `[odoo.mail]`", "the server's name"),
        "connection" | "greeting" => of(
            "make sure that `smarthost` in `[odoo.mail]` is right, that a firewall permits the connection, and that `tls` \
             fits the port: \"tls\" for 465, \"starttls\" for 587 and 25",
            "host, port and encryption",
        ),
        "starttls" => of(
            "the server offers no STARTTLS on this port: set `tls = \"tls\"` and the port 465, or ask its operator",
            "the encryption",
        ),
        "tls" => of(
            "the server does not speak TLS as `tls` in `[odoo.mail]` says: compare it with the port",
            "the encryption",
        ),
        "certificate" => of(
            "write the name of the certificate in `smarthost`; for an authority of your own, name its certificate in `ca` \
             of `[odoo.mail]`",
            "the server's name",
        ),
        "login" => of(
            &format!("compare `user` in `[odoo.mail]`, type `bakehouse secret odoo_mail` with the password, {rollout}"),
            "user and password",
        ),
        "sender" => of(
            &format!(
                "set `from` in `[odoo.mail]` to an address that the mail server accepts from this user, {rollout}"
            ),
            "the sender (FROM Filtering)",
        ),
        "recipient" => {
            "make sure that the address exists, and that the mail server forwards mail of this user to other \
                        domains"
                .to_owned()
        }
        "content" => "ask the operator of the mail server: it has refused the content".to_owned(),
        _ => format!("`bakehouse logs -u odoo-http` has Odoo's errors; mail servers of Odoo are in {odoo}"),
    };
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(step: &str, message: &str) -> MailReport {
        MailReport {
            server: "mail.acme.example:587".to_owned(),
            source: "fleet".to_owned(),
            sender: "erp@acme.example".to_owned(),
            to: "anna@acme.example".to_owned(),
            step: step.to_owned(),
            message: message.to_owned(),
            ..MailReport::default()
        }
    }

    fn shown(report: MailReport) -> String {
        let help = help(&report);
        MailTestResult { node: "app-1".to_owned(), report, help }.to_string()
    }

    #[test]
    fn answers_are_shown_word_for_word_with_the_fix() {
        assert_eq!(
            shown(refused("login", "535 5.7.8 Authentication failed\u{1b}[2J")),
            "app-1: mail.acme.example:587 has not accepted a mail to anna@acme.example (login): 535 5.7.8 Authentication \
             failed\u{fffd}[2J\n  help: compare `user` in `[odoo.mail]`, type `bakehouse secret odoo_mail` with the \
             password, raise `version`, and publish\n"
        );
        assert_eq!(
            shown(refused("", "")),
            "app-1: mail.acme.example:587 has accepted a mail from erp@acme.example to anna@acme.example\n"
        );
        let own = MailReport { source: "odoo".to_owned(), name: "Old".to_owned(), ..refused("login", "535 no") };
        let text = shown(own);
        assert!(text.contains("mail.acme.example:587 (`Old` in Odoo's settings)"), "{text}");
        assert!(text.contains("help: correct user and password in Odoo: Settings, Technical"), "{text}");
        let none = MailReport { server: String::new(), ..refused("no_server", "Odoo has no mail server") };
        assert!(shown(none).starts_with("app-1: Odoo has not accepted a mail"), "Odoo refuses");
    }

    #[test]
    fn each_step_has_a_fix() {
        // The steps that the node's script reports.
        let script = concat!(
            include_str!("../../../overlays/odoo/usr/lib/bakehouse/odoo_mail.py"),
            include_str!("../../../overlays/odoo/usr/lib/bakehouse/odoo-mail"),
        );
        let steps = [
            "no_server",
            "no_sender",
            "name",
            "connection",
            "greeting",
            "starttls",
            "tls",
            "certificate",
            "login",
            "sender",
            "recipient",
            "content",
            "odoo",
        ];
        for step in steps {
            assert!(script.contains(&format!("\"{step}\"")), "{step}");
            assert!(help(&refused(step, "x")).is_some_and(|help| !help.is_empty()), "{step}");
        }
    }

    #[test]
    fn report_is_found_between_lines_of_odoos_log() {
        let line = serde_json::to_string(&refused("recipient", "550 no")).unwrap();
        let output = format!("2026-12-01 INFO odoo: {{}}\n{{\"a\": 1}}\n{line}\nWARNING\n");
        assert_eq!(report(&output).unwrap(), refused("recipient", "550 no"));
        assert_eq!(report("Traceback\nKeyError: 'x'\n"), None);
    }
}
