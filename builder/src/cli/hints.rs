//! Help for commands that do not exist, but that users of other tools may type.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Words, and the help that Bakehouse prints for them.
const WORDS: [(&[&str], &str); 19] = [
    (
        &["restore", "recover"],
        "set `[backup] restore` in fleet.toml to a time, raise `version`, and start the database nodes from blank disks \
         (docs/howto/backups.md)",
    ),
    (
        &["backups", "dump"],
        "nodes back up by themselves: `[backup]` in fleet.toml sets place and times; `bakehouse backup now` makes one now \
         (docs/howto/backups.md)",
    ),
    (&["ssh", "shell", "attach"], "nodes have no login; `bakehouse exec NODE COMMAND` runs a command as root"),
    (&["sql", "db", "query", "postgres"], "`bakehouse psql -c SQL` runs SQL on the primary"),
    (&["log", "journal", "tail"], "`bakehouse logs NODE` prints a node's journal, and `-f` follows it"),
    (
        &["upgrade", "update", "deploy", "apply", "push"],
        "`bakehouse lock --update` takes newer packages; then raise `version`, and run `bakehouse plan DIR` and \
         `bakehouse publish DIR`",
    ),
    (
        &["rollback", "undo", "downgrade"],
        "publish the older content with a higher `version`; a version that fails on a \
     node is denied by itself (`bakehouse rollout`)",
    ),
    (&["start", "run", "boot"], "`bakehouse up` starts local machines"),
    (
        &["stop", "shutdown", "halt", "kill"],
        "`bakehouse down` stops local machines; `bakehouse poweroff NODE` switches a node of a real fleet off, and \
         `bakehouse leave NODE` removes it",
    ),
    (&["tcpdump", "capture", "wireshark"], "`bakehouse pcap NODE` captures packets of a node"),
    (&["ip", "wg", "network", "interfaces", "routes", "ping"], "`bakehouse net NODE` shows the network of a node"),
    (&["df", "disks", "storage"], "`bakehouse disk NODE` shows the disks of a node"),
    (&["reload"], "`bakehouse restart NODE UNIT` restarts a unit"),
    (
        &["cordon", "maintenance", "disable", "evacuate"],
        "`bakehouse drain NODE` takes a node out of service, and `bakehouse undrain NODE` puts it back",
    ),
    (&["uncordon", "enable"], "`bakehouse undrain NODE` puts a drained node into service again"),
    (&["failover", "promote"], "`bakehouse switchover` hands the primary over to a standby"),
    (&["user", "users", "access", "login"], "`bakehouse operator add NAME` gives a person access"),
    (
        &["ps", "list", "ls", "health", "doctor", "nodes", "monitor"],
        "`bakehouse status` shows the nodes, `bakehouse check` the files",
    ),
    (
        &["install", "write", "burn"],
        "`bakehouse flash` writes a disk, `bakehouse vm` a virtual machine's disk, `bakehouse \
     netboot` installs over the network",
    ),
];

/// Returns the error and its help for a command that does not exist, if it is one of [`WORDS`].
pub(super) fn unknown_command(error: &clap::Error) -> Option<String> {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return None;
    }
    let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else { return None };
    let (_, help) = WORDS.iter().find(|(words, _)| words.contains(&word.as_str()))?;
    Some(format!("there is no command `{word}`\n  help: {help}"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;
    use crate::cli::args::Cli;

    fn answer(args: &[&str]) -> Option<String> {
        unknown_command(&Cli::try_parse_from([&["bakehouse"], args].concat()).map(drop).expect_err("no command"))
    }

    #[test]
    fn answers_verbs_of_other_tools() {
        for (verb, part) in [
            ("restore", "[backup] restore"),
            ("ssh", "bakehouse exec NODE"),
            ("journal", "bakehouse logs NODE"),
            ("dump", "bakehouse backup now"),
            ("upgrade", "bakehouse lock --update"),
        ] {
            let answer = answer(&[verb, "db-1"]).expect(verb);
            assert!(answer.starts_with(&format!("there is no command `{verb}`\n  help: ")) && answer.contains(part));
        }
        assert_eq!(answer(&["chekc"]), None, "clap suggests `check`");
        assert_eq!(answer(&["check", "--frob"]), None);
    }

    #[test]
    fn no_word_is_a_command() {
        let command = Cli::command();
        for word in WORDS.iter().flat_map(|(words, _)| words.iter()) {
            assert!(command.get_subcommands().all(|known| known.get_name() != *word), "{word} is a command");
        }
    }

    #[test]
    fn hints_name_existing_commands() {
        let command = Cli::command();
        let names: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
        for (_, help) in WORDS {
            for named in help.split("`bakehouse ").skip(1).filter_map(|rest| rest.split([' ', '`']).next()) {
                assert!(names.contains(&named), "{named} in {help}");
            }
        }
    }

    #[test]
    fn exec_takes_a_command_with_and_without_dashes() {
        use crate::cli::args::Command;
        use crate::cli::verbs::ExecArgs;
        for args in [&["exec", "hub-1", "ls", "-la"][..], &["exec", "hub-1", "--", "ls", "-la"]] {
            let cli = Cli::try_parse_from([&["bakehouse"], args].concat()).expect("it parses");
            let Command::Exec(ExecArgs { node, command, .. }) = cli.command else { panic!("another command") };
            assert_eq!((node.as_str(), command), ("hub-1", vec!["ls".to_owned(), "-la".to_owned()]));
        }
        let cli = Cli::try_parse_from(["bakehouse", "exec", "hub-1", "--json", "--", "-x"]).expect("it parses");
        assert!(cli.json && matches!(cli.command, Command::Exec(ExecArgs { command, .. }) if command == ["-x"]));
    }
}
