//! Client of etcd's JSON gateway: key-value store, cluster members, users and watches.

mod gateway;
mod leader;
mod ranges;
mod users;
mod watch;

pub use gateway::{Compare, Etcd, EtcdMember, KeyValue, Op, pairs};
pub use watch::{Watch, WatchEvent, changes};
