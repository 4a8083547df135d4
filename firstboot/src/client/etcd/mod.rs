//! etcd, by its JSON gateway: key-value store, cluster members, users, and watches.

mod gateway;
mod users;
mod watch;

pub use gateway::{Etcd, EtcdMember, If, Pair, Then, pairs};
pub use watch::{Change, Watch, changes};
