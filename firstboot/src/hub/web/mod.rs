//! The certificate for browsers: the hubs order it by ACME (RFC 8555), renew it, and use it. One hub orders at a time,
//! each can continue another's order, and each answers the authority's questions (HTTP-01).

mod answers;
mod certificate;
mod directory;
mod install;
mod keeper;
mod metrics;
mod order;
mod records;
mod start;

pub use certificate::WebCertificate;
pub use keeper::{Clock, Pace, WebKeeper, WebPaths};
pub use start::web_file_for_start;
