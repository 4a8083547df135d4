//! What one taken machine can do to the rest of the fleet, cell by cell. A fleet in containers with each kind of
//! node; an attacker who is root on one of them, one whose machine was evicted, and some who have no machine at all.
//! The table is printed in docs/security.md; UPDATE_GOLDEN=1 writes it there.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::containment::{
    Arena, Door, Foothold, GROUP, HUB_MAC, Matrix, NetbootServer, Place, RogueHub, Target, ask_to_join, attack,
    attack_netboot, join, publish, request_of, rogue_effect,
};
use bakehouse_tests::{Lab, Machine};

const NODES: [&str; 8] = ["hub-1", "hub-2", "db-1", "db-2", "app-1", "monitor-1", "watch-1", "vault-1"];

/// The third vote is monitor-1's. Of the group `app` most slots are free.
fn fleet() -> String {
    format!(
        "name = \"contained\"\nversion = \"1\"\n\n[backup]\nnode = \"vault-1\"\n\n\
         [netboot]\nothers = \"{GROUP}\"\n[netboot.machines]\n\"{HUB_MAC}\" = \"hub-1\"\n\n\
         [groups.hub]\ncount = 2\nendpoints = [\"hub1.example.net\", \"hub2.example.net\"]\n\
         [groups.db]\ncount = 2\n[groups.app]\ncount = 6\n[groups.monitor]\ncount = 1\n[groups.vault]\ncount = 1\n\
         [groups.watch]\nroles = [\"monitor\"]\ncount = 1\nfirst = \"10.10.0.35\"\n"
    )
}

#[test]
fn in_containers_one_taken_machine_reaches_what_the_page_says() {
    let lab = Lab::empty("containment");
    lab.write("fleet.toml", &fleet());
    lab.has_idle_role("vault", false);
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let begun = Instant::now();
    let arena = Arena::up(lab, &NODES);
    println!("from nothing to ready: {:.0} s", begun.elapsed().as_secs_f64());
    arena.has_users();
    has_a_backup(&arena);

    let mut matrix = Matrix::default();
    let nodes = [
        (Place::App, "app-1"),
        (Place::Monitor, "watch-1"),
        (Place::Db, "db-2"),
        (Place::Voter, "monitor-1"),
        (Place::Keeper, "vault-1"),
    ];
    for (place, node) in nodes {
        try_all(&arena, &Foothold::on(&arena, place, node), &mut matrix);
    }
    try_outsiders(&arena, &mut matrix);
    try_all(&arena, &Foothold::on(&arena, Place::Hub, "hub-2"), &mut matrix);
    try_evicted_hub(&arena, &mut matrix);

    println!("in all: {:.0} s\n\n{}", begun.elapsed().as_secs_f64(), matrix.markdown());
    let differences = matrix.differences();
    assert!(differences.is_empty(), "not as expected:\n{}", differences.join("\n"));
    serves(arena.machine("app-1"), &arena);
    publish(&matrix.markdown());
}

fn try_all(arena: &Arena, from: &Foothold, matrix: &mut Matrix) {
    for target in Target::ALL {
        matrix.enter(from.place, target, attack(arena, from, target));
    }
}

/// Those who have no node: one with a ticket, one with a request that it heard, one beside `bakehouse netboot`.
fn try_outsiders(arena: &Arena, matrix: &mut Matrix) {
    let mut holder = Foothold::outside(arena, Place::TokenHolder);
    holder.tickets = vec![arena.ticket(GROUP, 1)];
    try_all(arena, &holder, matrix);

    let mut stranger = Foothold::outside(arena, Place::Stranger);
    let (grant, captured) =
        join(arena, &stranger, &arena.ticket(GROUP, 1), GROUP).expect("a ticket is good for a slot");
    println!("  {} has joined, and its request was heard", grant.slot);
    stranger.captured = vec![captured];
    try_all(arena, &stranger, matrix);

    let server = NetbootServer::start(arena, &[]);
    let mut host = Foothold::outside(arena, Place::PxeHost);
    attack_netboot(arena, &mut host);
    try_all(arena, &host, matrix);
    drop(server);
}

/// A hub that has left by `bakehouse leave --now`, whose root goes on: the agent was stopped before, so that nothing
/// on the machine is; in its place is a server that lies to whoever asks.
fn try_evicted_hub(arena: &Arena, matrix: &mut Matrix) {
    let mut hub = Foothold::on(arena, Place::EvictedHub, "hub-2");
    arena.machine("hub-2").ok("systemctl stop firstboot");
    arena.lab.ok(&["leave", "hub-2", "--now", "--endpoint", "local"]);
    let evicted = Instant::now();
    let rogue = RogueHub::serve(arena, &Arc::new(hub.clone()));

    // A machine that joins asks any hub that its image names, this one too.
    let joiner = Foothold::outside(arena, Place::Stranger);
    let node = arena.node("hub-2");
    let door = Door { host: arena.public(node).to_string(), port: arena.topology.mesh.port, name: node.name.clone() };
    let ticket = arena.ticket(GROUP, 1);
    let request = request_of(&ticket, GROUP);
    let answer = joiner.run(|| async { ask_to_join(&joiner, &door, &ticket, &request).await });
    println!("  the evicted hub, asked to join: {:?}", answer.map(|(grant, _)| grant.slot));
    hub.captured = rogue.captured();
    assert_eq!(hub.captured.len(), 1, "the joiner's request did not reach the evicted hub");

    // The fleet's word has a minute to reach all.
    sleep(Duration::from_secs(60));
    for target in Target::ALL.into_iter().filter(|t| *t != Target::MeshKeys) {
        matrix.enter(hub.place, target, attack(arena, &hub, target));
    }
    while evicted.elapsed() < Duration::from_secs(75) {
        sleep(Duration::from_millis(200));
    }
    let asked = rogue.asked();
    println!("  the evicted hub was asked {} times: {:?}", asked.len(), asked.iter().take(8).collect::<Vec<_>>());
    let finding = rogue_effect(arena, &hub).unwrap_or_else(|| attack(arena, &hub, Target::MeshKeys));
    matrix.enter(hub.place, Target::MeshKeys, finding);
}

/// Waits until the repository has a backup: there must be something to be had.
fn has_a_backup(arena: &Arena) {
    let listed =
        "for i in $(seq 90); do [ -e /var/lib/pgbackrest/backup/main/backup.info ] && exit; sleep 1; done; exit 1";
    arena.machine("vault-1").ok(listed);
}

/// Whether a client reaches the database by the VIP, still.
fn serves(client: &Machine, arena: &Arena) {
    client.ok(&format!("for i in $(seq 20); do (</dev/tcp/{}/443) && exit; sleep 1; done; exit 1", arena.topology.vip));
}
