//! The builder's commands, with the real binary, real packages and the real hub image.

mod build;
mod flash;
mod fleet_key;
