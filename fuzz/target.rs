//! One program for each target of `tests/src/targets.rs`: its name is the target's.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bakehouse_tests::targets::run(env!("CARGO_BIN_NAME"), bytes));
