//! `bakehouse operator wireguard`: an operator's machine becomes a WireGuard peer of the hubs.

use std::fs;
use std::io::ErrorKind;

use fleet::WireguardKey;

use super::access::{NodeContext, Operated};
use super::node_results::OperatorWireguardResult;
use super::results::CommandResult;
use super::verbs::OperatorWireguardArgs;
use crate::deploy::nodes::run;
use crate::deploy::operator_peer::register;
use crate::error::{Error, Result, fail};
use crate::keys::operator_wireguard::{Owner, configuration, file_name, key_in};
use crate::util::fs::{shown, write_private};
use crate::util::time::rfc3339;

/// Registers this machine with a hub, and writes the configuration for wg-quick.
pub(super) fn wireguard(context: &NodeContext, args: &OperatorWireguardArgs) -> Result<CommandResult> {
    let Operated { file, entries, port, .. } = context.operated(&args.access)??;
    let name = &file.operator.name;
    if *name != args.name {
        let text = format!("the operator's file is that of `{name}`\n  help: `--operator FILE` names another one");
        return Err(Error::Usage(text));
    }
    if let Some(hub) = args.hub.as_ref().filter(|hub| entries.iter().all(|entry| entry.hub != **hub)) {
        return Err(Error::Usage(format!("there is no hub `{hub}` with a known address")));
    }
    let path = args.output.join(file_name(name));
    let key = match fs::read_to_string(&path) {
        // Hubs accept one machine of an operator, and it keeps its key.
        Ok(text) => match key_in(&text) {
            Some(key) => key,
            None => return fail(format!("{} has no private key of WireGuard\n  help: move it away", shown(&path))),
        },
        Err(e) if e.kind() == ErrorKind::NotFound => {
            WireguardKey::generate().map_err(Error::cannot("get random bytes from the kernel"))?
        }
        Err(e) => return Err(Error::io("read", &path)(e)),
    };
    let step = context.progress.step("wireguard", "registering this machine with a hub");
    let (hub, peering) = run(register(&file, &entries, port, &key))??;
    drop(step);
    let hosts = entries.iter().map(|entry| (entry.hub.clone(), entry.host.clone())).collect();
    let expires_at = rfc3339(file.expires);
    let owner = Owner { name, fleet: &file.fleet, expires: &expires_at };
    let text = configuration(&owner, &key, &peering, &hosts, args.hub.as_deref());
    write_private(&path, text.as_bytes())?;
    let address = peering.address.to_string();
    context.progress.say("wireguard", &format!("{hub} gave this machine the address {address}"));
    context.progress.say("next", &format!("`sudo wg-quick up {}`; the file has a private key", shown(&path)));
    let hubs = peering.hubs.into_keys().filter(|hub| entries.iter().any(|entry| entry.hub == *hub)).collect();
    let result = OperatorWireguardResult { name: name.clone(), path, address, hubs, expires: file.expires, expires_at };
    Ok(CommandResult::OperatorWireguard(result))
}
