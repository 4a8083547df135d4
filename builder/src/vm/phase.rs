//! Finds the phase of a machine's boot in the text of its console.

use super::command::last_line;
use super::machine::AGENT;

/// Parts of console lines that belong to a phase, in the order of a boot.
const PHASES: [(&str, &[&str]); 4] = [
    ("firmware", &["BdsDxe:", "SeaBIOS"]),
    ("kernel", &["EFI stub:", "Linux version "]),
    ("disk", &["dev-disk-", "systemd-repart", "systemd-fsck", "veritysetup", "var.mount", "Switching root"]),
    ("services", &["dbus-broker", "firstboot.service", "multi-user.target"]),
];

/// Returns the phase of a machine's last boot: `firmware`, `kernel`, `disk`, `agent` or `services`, or `off` if the
/// console is empty. If the agent has printed a message, the phase is `agent` or `services`, followed by the message.
#[must_use]
pub(super) fn phase(console: &str) -> String {
    // If the machine restarted, the console begins with the text of an earlier boot.
    let last = |marks: &[&str]| marks.iter().filter_map(|mark| console.rfind(mark)).max();
    let boot = last(PHASES[0].1).or_else(|| last(PHASES[1].1)).map_or(console, |at| &console[at..]);
    if let Some((_, message)) = boot.lines().rev().find_map(|line| line.split_once(AGENT)) {
        let message = message.trim();
        let name = if message.contains(": starting ") { "services" } else { "agent" };
        return format!("{name}: {message}");
    }
    let reached = PHASES.iter().rev().find(|(_, marks)| marks.iter().any(|mark| boot.contains(mark)));
    match reached {
        Some((name, _)) => (*name).to_owned(),
        None if last_line(console).is_empty() => "off".to_owned(),
        None => "firmware".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_phase_of_each_part_of_a_boot() {
        let mut console = String::new();
        for (lines, expected) in [
            ("", "off"),
            ("BdsDxe: loading Boot0001 \"UEFI Misc Device\"\n", "firmware"),
            ("EFI stub: Loaded initrd from LINUX_EFI_INITRD_MEDIA_GUID device path\n", "kernel"),
            ("[    0.000000] Linux version 6.12.118+deb13-cloud-amd64\n", "kernel"),
            ("[  116.988349] systemd[1]: bpf-restrict-fs: LSM BPF program attached\n", "kernel"),
            ("[*     ] Job dev-disk-by\\x2dpartlabel-var.de…ce/start running (1min 12s / 5min)\n", "disk"),
            ("[  OK  ] Reached target initrd.target - Initrd Default Target.\n", "disk"),
            ("[  OK  ] Started dbus-broker.service - D-Bus System Message Bus.\n", "services"),
            ("bakehouse: asking hub-1, hub-2 for a slot in db\n", "agent: asking hub-1, hub-2 for a slot in db"),
            ("[  OK  ] Started patroni.service.\n", "agent: asking hub-1, hub-2 for a slot in db"),
            ("bakehouse: db-1: starting db\n", "services: db-1: starting db"),
            ("bakehouse: db-1: restarting with version 2\n", "agent: db-1: restarting with version 2"),
            ("BdsDxe: starting Boot0001 \"UEFI Misc Device\"\n", "firmware"),
        ] {
            console.push_str(lines);
            assert_eq!(phase(&console), expected, "{lines}");
        }
    }

    #[test]
    fn first_output_is_the_firmware_phase() {
        assert_eq!(phase("[ "), "firmware");
        assert_eq!(phase("SeaBIOS (version 1.16)\nbooting\n"), "firmware");
    }
}
