//! The command line accepts every command that an alert, `docs/operations.md` or a message of a node quotes.
//! `tests/machines/runbooks.rs` runs them. A unit test of `builder` does the same for the other pages.

use bakehouse_tests::runbooks::{Quoted, all_alerts, all_messages, of_alert, of_messages, of_operations};
use builder::cli::accepts;

/// Returns what the command line refuses.
fn refused(commands: &[Quoted]) -> Vec<String> {
    let refusal = |quoted: &Quoted| {
        let why = accepts(&quoted.words(), quoted.whole).err()?;
        Some(format!("{}: `{}`: {why}", quoted.at, quoted.text))
    };
    commands.iter().filter_map(refusal).collect()
}

#[track_caller]
fn are_accepted(commands: &[Quoted], at_least: usize) {
    let refused = refused(commands);
    assert!(refused.is_empty(), "bakehouse does not accept these commands:\n{}", refused.join("\n"));
    assert!(commands.len() >= at_least, "only {} commands found", commands.len());
}

#[test]
fn commands_of_alerts_are_accepted() {
    are_accepted(&all_alerts().iter().flat_map(of_alert).collect::<Vec<_>>(), 70);
}

#[test]
fn commands_of_operations_are_accepted() {
    are_accepted(&of_operations(), 10);
}

#[test]
fn commands_of_messages_are_accepted() {
    are_accepted(&of_messages(), 15);
}

#[test]
fn an_unknown_verb_or_option_is_refused() {
    let quoted = |text: &str, whole| Quoted { at: "here".to_owned(), text: text.to_owned(), whole };
    let wrong = [quoted("bakehouse fly", false), quoted("bakehouse logs NODE --unitt x", false)];
    assert_eq!(refused(&wrong).len(), 2);
    let incomplete = "bakehouse restart NODE";
    assert_eq!(refused(&[quoted(incomplete, true)]).len(), 1);
    assert_eq!(
        refused(&[quoted(incomplete, false), quoted("bakehouse operator add VALUE --role VALUE", false)]).len(),
        0
    );
}

/// Real nodes have no shell for operators, except by `bakehouse exec`.
#[test]
fn no_message_names_a_program_that_operators_cannot_type() {
    for (at, message) in all_messages() {
        for program in ["journalctl -", "systemctl status", "systemctl restart", "patronictl ", "birdc show"] {
            assert!(!message.contains(program), "{at}: {message}");
        }
    }
}
