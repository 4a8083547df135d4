//! One program for each target of `tests/src/targets.rs`, with the target's name.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bakehouse_tests::targets::run(env!("CARGO_BIN_NAME"), bytes));
