//! What an attacker with root on one machine can do to the rest of the fleet. The fleet runs in containers and has a
//! node of each kind. Attackers are root on a node, root on an evicted hub, or on a host outside the fleet.
//! `UPDATE_GOLDEN=1` writes the table of results to docs/security.md.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::containment::{
    Arena, Door, Foothold, GROUP, HUB_MAC, Matrix, NetbootServer, Place, RogueHub, Target, ask_to_join, attack,
    attack_netboot, join, publish, request_of, rogue_effect,
};
use bakehouse_tests::{Machine, TestFleet};

const NODES: [&str; 8] = ["hub-1", "hub-2", "db-1", "db-2", "app-1", "monitor-1", "watch-1", "vault-1"];

/// monitor-1 has the third vote. Most slots of the group `app` are free.
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
fn attacks_in_containers_reach_only_what_the_table_expects() {
    let lab = TestFleet::empty("containment");
    lab.write("fleet.toml", &fleet());
    lab.has_idle_role("vault", false);
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let begun = Instant::now();
    let arena = Arena::up(lab, &NODES);
    println!("from empty folders to ready: {:.0} s", begun.elapsed().as_secs_f64());
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

    println!("total: {:.0} s\n\n{}", begun.elapsed().as_secs_f64(), matrix.markdown());
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

/// Attacks from hosts outside the fleet: one with a ticket, one with a recorded join request, one on the network of
/// `bakehouse netboot`.
fn try_outsiders(arena: &Arena, matrix: &mut Matrix) {
    let mut holder = Foothold::outside(arena, Place::TokenHolder);
    holder.tickets = vec![arena.ticket(GROUP, 1)];
    try_all(arena, &holder, matrix);

    let mut stranger = Foothold::outside(arena, Place::Stranger);
    let (grant, captured) = join(arena, &stranger, &arena.ticket(GROUP, 1), GROUP).expect("the ticket of a free slot");
    println!("  {} has joined, and the attacker has recorded its request", grant.slot);
    stranger.captured = vec![captured];
    try_all(arena, &stranger, matrix);

    let server = NetbootServer::start(arena, &[]);
    let mut host = Foothold::outside(arena, Place::PxeHost);
    attack_netboot(arena, &mut host);
    try_all(arena, &host, matrix);
    drop(server);
}

/// Attacks from a hub that the operator evicted with `bakehouse leave --now`. Before that, the attacker has stopped the
/// agent, and serves false replies in its place. So the eviction stops no daemon on the machine.
fn try_evicted_hub(arena: &Arena, matrix: &mut Matrix) {
    let mut hub = Foothold::on(arena, Place::EvictedHub, "hub-2");
    arena.machine("hub-2").ok("systemctl stop firstboot");
    arena.lab.ok(&["leave", "hub-2", "--now", "--endpoint", "local"]);
    let evicted = Instant::now();
    let rogue = RogueHub::serve(arena, &Arc::new(hub.clone()));

    // A joining machine may ask any hub in its image's topology, also the evicted one.
    let joiner = Foothold::outside(arena, Place::Stranger);
    let node = arena.node("hub-2");
    let door = Door { host: arena.public(node).to_string(), port: arena.topology.mesh.port, name: node.name.clone() };
    let ticket = arena.ticket(GROUP, 1);
    let request = request_of(&ticket, GROUP);
    let answer = joiner.run(|| async { ask_to_join(&joiner, &door, &ticket, &request).await });
    println!("  join through the evicted hub: {:?}", answer.map(|(grant, _)| grant.slot));
    hub.captured = rogue.captured();
    assert_eq!(hub.captured.len(), 1, "the joiner's request did not reach the evicted hub");

    // Every node reads the eviction from another hub within 60 s.
    sleep(Duration::from_secs(60));
    for target in Target::ALL.into_iter().filter(|t| *t != Target::MeshKeys) {
        matrix.enter(hub.place, target, attack(arena, &hub, target));
    }
    while evicted.elapsed() < Duration::from_secs(75) {
        sleep(Duration::from_millis(200));
    }
    let asked = rogue.asked();
    println!("  {} requests to the evicted hub: {:?}", asked.len(), asked.iter().take(8).collect::<Vec<_>>());
    let finding = rogue_effect(arena, &hub).unwrap_or_else(|| attack(arena, &hub, Target::MeshKeys));
    matrix.enter(hub.place, Target::MeshKeys, finding);
}

/// Waits until the repository has a backup that an attacker could read.
fn has_a_backup(arena: &Arena) {
    let listed =
        "for i in $(seq 90); do [ -e /var/lib/pgbackrest/backup/main/backup.info ] && exit; sleep 1; done; exit 1";
    arena.machine("vault-1").ok(listed);
}

/// Asserts that a client still reaches the VIP.
fn serves(client: &Machine, arena: &Arena) {
    client.ok(&format!("for i in $(seq 20); do (</dev/tcp/{}/443) && exit; sleep 1; done; exit 1", arena.topology.vip));
}
