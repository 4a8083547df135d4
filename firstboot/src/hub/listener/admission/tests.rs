use super::*;

use fleet::OperatorRole::{self, Admin, Viewer};

const LIMITS: Limits = Limits {
    guests: 8,
    members: 3,
    address: 2,
    known_address: 6,
    network: 4,
    slot: 2,
    operators: 6,
    viewers: 4,
    operator: 3,
};

/// Admits one connection a second, so that no rate limit applies.
struct TestListener {
    admission: Arc<Admission>,
    now: Instant,
}

impl TestListener {
    fn new() -> Self {
        Self { admission: Admission::new(LIMITS), now: Instant::now() }
    }

    fn enter(&mut self, from: &str) -> Option<AdmittedConnection> {
        self.now += Duration::from_secs(1);
        self.admission.enter(from.parse().unwrap(), false, self.now).map(|(place, _)| place)
    }

    fn is_open(&self, place: &AdmittedConnection) -> bool {
        self.admission.state().open.contains_key(&place.id)
    }

    fn open(&self, places: &[AdmittedConnection]) -> Vec<bool> {
        places.iter().map(|p| self.is_open(p)).collect()
    }
}

#[test]
fn member_has_a_rate_of_changes_of_its_own() {
    let mut listener = TestListener::new();
    let place = listener.enter("192.0.2.9").unwrap();
    let now = listener.now;
    let delays: Vec<Option<Duration>> = (0..100).map(|_| place.charge_member("app-1", now)).collect();
    let (burst, per_second) = (CHANGES.1 as usize, CHANGES.0 as usize);
    assert!(delays[..burst].iter().all(|delay| *delay == Some(Duration::ZERO)), "{delays:?}");
    assert_eq!(delays.iter().flatten().count(), burst + per_second, "later ones are delayed for 1 s, then refused");
    assert_eq!(place.charge_member("app-2", now), Some(Duration::ZERO));
    assert_eq!(place.charge_member("app-1", now + Duration::from_secs(60)), Some(Duration::ZERO));
}

#[test]
fn displaces_oldest_guest_of_the_same_source() {
    let mut listener = TestListener::new();
    let other = listener.enter("192.0.2.9").unwrap();
    let own: Vec<AdmittedConnection> = (0..3).map(|_| listener.enter("192.0.2.1").unwrap()).collect();
    assert_eq!(listener.open(&own), [false, true, true]);
    // The network's limit is four connections: three are open, and two more arrive.
    let more: Vec<AdmittedConnection> = (2..4).map(|i| listener.enter(&format!("192.0.2.{i}")).unwrap()).collect();
    assert!(!listener.is_open(&other), "the oldest guest of the network is still open");
    assert_eq!((listener.open(&own), listener.open(&more)), (vec![false, true, true], vec![true, true]));
    drop((own, more, other));
    let state = listener.admission.state();
    assert!(state.open.is_empty() && state.idle.is_empty() && state.addresses.is_empty());
    assert!(state.networks.is_empty() && state.members.is_empty() && state.slots.is_empty());
}

#[test]
fn admits_guests_and_members_at_the_limit_of_guests() {
    let mut listener = TestListener::new();
    let guests: Vec<AdmittedConnection> = (0..9).map(|i| listener.enter(&format!("198.51.{i}.1")).unwrap()).collect();
    assert_eq!(listener.open(&guests).iter().filter(|open| !**open).count(), 1);
    assert!(!listener.is_open(&guests[0]));
    // A busy connection is not displaced, however old it is.
    guests[1].set_busy(true);
    let next = listener.enter("203.0.113.1").unwrap();
    assert_eq!(listener.open(&guests[1..3]), [true, false]);
    guests[1].set_busy(false);
    // A member leaves the guests' limit, so the next guest displaces no other.
    assert!(next.is_member("app-1", listener.now));
    let last = listener.enter("203.0.113.7").unwrap();
    assert_eq!((listener.is_open(&guests[1]), listener.is_open(&next), listener.is_open(&last)), (true, true, true));
    // If all are busy, a new connection is refused.
    guests.iter().chain([&last]).for_each(|guest| guest.set_busy(true));
    assert!(listener.enter("203.0.113.8").is_none());
    assert_eq!(listener.admission.take_counts(), (1, 2));
}

#[test]
fn one_member_cannot_use_up_the_members_limit() {
    let mut listener = TestListener::new();
    let member = |listener: &mut TestListener, slot: &str, i: u8| {
        let place = listener.enter(&format!("192.0.{i}.1")).unwrap();
        assert!(place.is_member(slot, listener.now));
        place
    };
    let one: Vec<AdmittedConnection> = (0..3).map(|i| member(&mut listener, "app-1", i)).collect();
    assert_eq!(listener.open(&one), [false, true, true]);
    let others: Vec<AdmittedConnection> = (2..4).map(|i| member(&mut listener, &format!("app-{i}"), i)).collect();
    assert_eq!((listener.open(&one), listener.open(&others)), (vec![false, false, true], vec![true, true]));
    // A connection over the mesh counts as a member's from the start.
    let now = listener.now + Duration::from_secs(1);
    let (mesh, _) = listener.admission.enter("10.10.0.20".parse().unwrap(), true, now).unwrap();
    assert_eq!((listener.is_open(&one[2]), listener.is_open(&mesh)), (false, true));
}

impl TestListener {
    /// Admits a connection of an operator from an address of its own; `None` if the hub refuses it.
    fn operator(&mut self, name: &str, role: OperatorRole) -> Option<AdmittedConnection> {
        let i = self.now.elapsed().as_secs() + self.admission.state().next;
        let place = self.enter(&format!("192.0.{i}.1")).unwrap();
        place.is_operator(name, role, self.now).then_some(place)
    }

    fn operators(&mut self, name: &str, role: OperatorRole, count: usize) -> Vec<AdmittedConnection> {
        (0..count).map(|_| self.operator(name, role).unwrap()).collect()
    }
}

#[test]
fn strangers_and_members_do_not_displace_operators() {
    let mut listener = TestListener::new();
    let first = listener.operator("anna", Viewer).unwrap();
    let guests: Vec<AdmittedConnection> = (0..9).map(|i| listener.enter(&format!("198.51.{i}.1")).unwrap()).collect();
    assert_eq!((listener.is_open(&first), listener.open(&guests)[..2].to_vec()), (true, vec![false, true]));
    let members: Vec<AdmittedConnection> = (0..3).map(|i| listener.enter(&format!("203.0.{i}.1")).unwrap()).collect();
    assert!(members.iter().enumerate().all(|(i, m)| m.is_member(&format!("app-{i}"), listener.now)));
    let admins: Vec<Vec<AdmittedConnection>> = ["ben", "carl"].map(|name| listener.operators(name, Admin, 2)).into();
    assert!(listener.is_open(&first) && listener.open(&members) == [true; 3], "operators took a member's place");
    drop((first, admins));
    assert_eq!(listener.admission.state().operators.len(), 0);
}

#[test]
fn at_the_limit_an_old_connection_of_the_same_operator_makes_room() {
    let mut listener = TestListener::new();
    let other = listener.operator("ben", Viewer).unwrap();
    let own = listener.operators("anna", Viewer, 3);
    // A client that opens more connections at once gets a refusal, and its requests go on.
    assert!(listener.operator("anna", Viewer).is_none());
    assert_eq!(listener.open(&own), [true; 3]);
    // A laptop that slept left its connections.
    listener.now += Duration::from_secs(20);
    let next = listener.operator("anna", Viewer).unwrap();
    assert_eq!((listener.open(&own), listener.is_open(&next)), (vec![false, true, true], true));
    assert!(listener.is_open(&other));
    drop(own);
    assert_eq!(listener.admission.state().operators.len(), 2);
}

#[test]
fn viewers_do_not_prevent_others_from_reaching_a_node() {
    let mut listener = TestListener::new();
    let anna = listener.operators("anna", Viewer, 3);
    let ben = listener.operators("ben", Viewer, 1);
    // The viewers' places are taken. The one with the most gives one up, until both have the same number.
    let mut carl = vec![listener.operator("carl", Viewer).unwrap()];
    assert_eq!((listener.open(&anna), listener.open(&ben)), (vec![false, true, true], vec![true]));
    assert!(listener.operator("carl", Viewer).is_none(), "anna has two, and carl would have two");
    // Places that are not for viewers.
    let mut root = listener.operators("root", Admin, 2);
    assert_eq!((listener.open(&anna), listener.is_open(&carl[0])), (vec![false, true, true], true));
    let mut second = listener.operator("other", Admin).unwrap();
    assert_eq!(listener.open(&anna), [false, false, true], "all places are taken");
    assert!(listener.is_open(&second) && listener.open(&root) == [true; 2]);
    // A viewer displaces no admin.
    drop((anna, ben));
    carl.extend(listener.operators("carl", Viewer, 2));
    root.extend(listener.operators("root", Admin, 0));
    assert!(listener.is_open(&second) && listener.open(&root) == [true; 2] && listener.open(&carl) == [true; 3]);
    second = listener.operator("other", Admin).unwrap();
    assert!(listener.is_open(&second));
}

#[test]
fn limits_of_operators_hold_in_the_mesh() {
    let mut listener = TestListener::new();
    let mesh = |listener: &mut TestListener, i: u8| {
        listener.now += Duration::from_secs(1);
        let (place, _) =
            listener.admission.enter(format!("10.10.200.{i}").parse().unwrap(), true, listener.now).unwrap();
        let counted = place.is_operator("anna", Viewer, listener.now);
        (place, counted)
    };
    let all: Vec<(AdmittedConnection, bool)> = (0..4).map(|i| mesh(&mut listener, i)).collect();
    assert_eq!(all.iter().map(|(_, counted)| *counted).collect::<Vec<_>>(), [true, true, true, false]);
    let state = listener.admission.state();
    assert_eq!((state.operators.len(), state.members.len(), state.slots.len()), (3, 1, 1));
}

#[tokio::test]
async fn displacing_a_connection_ends_its_current_task() {
    let mut listener = TestListener::new();
    let own = listener.operators("anna", Viewer, 3);
    let tasks: Vec<_> = own.iter().map(|_| tokio::spawn(std::future::pending::<()>())).collect();
    own[0].set_task(tokio::spawn(async {}).abort_handle());
    own.iter().zip(&tasks).for_each(|(place, task)| place.set_task(task.abort_handle()));
    listener.now += Duration::from_secs(20);
    let next = listener.operator("anna", Viewer).unwrap();
    let [first, second, _] = <[_; 3]>::try_from(tasks).unwrap();
    assert!(first.await.unwrap_err().is_cancelled());
    // A task of a connection that was displaced before.
    let late = tokio::spawn(std::future::pending::<()>());
    own[0].set_task(late.abort_handle());
    assert!(late.await.unwrap_err().is_cancelled());
    assert!(!second.is_finished() && listener.is_open(&next));
}

#[test]
fn requests_of_one_operator_have_a_rate() {
    let mut listener = TestListener::new();
    let place = listener.operator("anna", Viewer).unwrap();
    let count =
        |kind, most: usize| (0..most).filter(|_| place.charge_operator("anna", kind, listener.now).is_some()).count();
    let plain = count(Kind::Other, 100);
    assert!((20..=26).contains(&plain), "{plain}");
    // The state of 1,000 nodes through one hub, at once.
    assert_eq!(count(Kind::Forwarded, 1000), 1000);
    let more = count(Kind::Forwarded, 1000);
    assert!(more < 500, "{more}");
    assert!(place.charge_operator("ben", Kind::Forwarded, listener.now).is_some_and(|delay| delay.is_zero()));
}

#[test]
fn known_address_has_a_higher_limit() {
    let mut listener = TestListener::new();
    let first = listener.enter("192.0.2.1").unwrap();
    assert!(first.is_member("app-1", listener.now));
    let office: Vec<AdmittedConnection> = (0..6).map(|_| listener.enter("192.0.2.1").unwrap()).collect();
    assert_eq!(listener.open(&office), [true; 6]);
    // Guests of known addresses are displaced last.
    let strangers: Vec<AdmittedConnection> =
        (0..9).map(|i| listener.enter(&format!("198.51.{i}.1")).unwrap()).collect();
    assert_eq!(listener.open(&office), [true; 6]);
    assert_eq!(listener.open(&strangers).iter().filter(|open| **open).count(), 2);
}

#[test]
fn refuses_floods_and_still_admits_known_addresses() {
    let admission = Admission::new(LIMITS);
    let now = Instant::now();
    let member: IpAddr = "203.0.113.1".parse().unwrap();
    let (place, _) = admission.enter(member, false, now).unwrap();
    assert!(place.is_member("app-1", now));
    let enter = |from: String| admission.enter(from.parse().unwrap(), false, now).is_some();
    let of_one = (0..1000).filter(|_| enter("192.0.2.1".to_owned())).count();
    assert!((100..=126).contains(&of_one), "{of_one}");
    let of_all = (0..5000).filter(|i| enter(format!("198.{}.{}.1", i / 250, i % 250))).count();
    assert!(of_all <= 2 * 601, "{of_all}");
    assert!(!enter("192.0.3.1".to_owned()), "an unknown address was admitted beyond the common limit");
    assert!(admission.enter(member, false, now).is_some_and(|(_, delay)| delay.is_zero()));
}
