//! Which code decides what each step of a build makes. `build.rs` hashes these files, and the hash is a part of the
//! step's key: a step whose code changed is not taken from the store.
//!
//! A test (`src/layers.rs`) fails where a file that is listed here imports one that is not.

/// A step whose results are kept in the store, and the code that makes them.
pub struct Step {
    /// The hash is the environment variable `CODE_` and this name while the crate is compiled.
    pub name: &'static str,
    /// Files and folders, below `builder/`.
    pub code: &'static [&'static str],
    /// Steps whose keys are a part of this one's key.
    pub inputs: &'static [&'static str],
}

pub const STEPS: [Step; 7] = [
    Step {
        name: "COMPOSE",
        code: &[
            "src/compose",
            "src/sandbox",
            "src/format/deb.rs",
            "src/format/deb822.rs",
            "src/packages/requests.rs",
            "src/util/digest.rs",
            "src/util/memory.rs",
        ],
        inputs: &[],
    },
    Step {
        name: "TOOLS",
        code: &[
            "src/toolchain.rs",
            "src/format/deb.rs",
            "src/format/deb822.rs",
            "src/packages/requests.rs",
            "src/util/digest.rs",
        ],
        inputs: &[],
    },
    Step {
        name: "CHECK",
        code: &[
            "src/bake",
            "src/assemble/layout.rs",
            "src/format/age.rs",
            "src/format/openpgp.rs",
            "src/format/verity.rs",
            "src/keys/authority.rs",
            "src/keys/passphrase.rs",
            "src/keys/update_key.rs",
            "src/project/secrets.rs",
            "src/util/digest.rs",
            "src/util/fs.rs",
            "src/util/json.rs",
            "src/util/random.rs",
        ],
        inputs: &["COMPOSE"],
    },
    Step {
        name: "GENERATE",
        code: &[
            "src/bake/mod.rs",
            "src/bake/generate.rs",
            "src/bake/migrations.rs",
            "src/bake/tar.rs",
            "src/bake/units.rs",
            "src/assemble/layout.rs",
            "src/format/verity.rs",
            "src/project/secrets.rs",
            "src/util/digest.rs",
            "src/util/fs.rs",
            "src/util/json.rs",
        ],
        inputs: &["COMPOSE"],
    },
    Step {
        name: "EROFS",
        code: &["src/assemble/root.rs", "src/format/verity.rs", "src/util/digest.rs", "src/util/process.rs"],
        inputs: &["COMPOSE", "TOOLS"],
    },
    Step {
        name: "INITRD",
        code: &[
            "src/assemble/initrd.rs",
            "src/format/cpio.rs",
            "src/format/elf.rs",
            "src/util/digest.rs",
            "src/util/fs.rs",
            "src/util/process.rs",
        ],
        inputs: &["COMPOSE", "TOOLS"],
    },
    // A whole image.
    Step { name: "ALL", code: &["src", "../firstboot/src", "../fleet/src", "../Cargo.lock"], inputs: &[] },
];
