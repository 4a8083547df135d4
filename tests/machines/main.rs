//! Nodes that run: in virtual machines, and in containers (their tests have `containers` in the name).

mod addons;
mod boot;
mod bootstrap;
mod cloud_init;
mod containers;
mod containment;
mod drain;
mod fleet;
mod ipxe;
mod journals;
mod legacy_bios;
mod netboot;
mod power_loss;
mod printing;
mod psql;
mod quick_ha;
mod rescue;
mod restore;
mod roles;
mod rolling_update;
mod runbooks;
mod secure_netboot;
mod upgrade;
