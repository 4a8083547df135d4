//! The code of each step of a build. `build.rs` hashes these files, and the hash is part of the step's key. A build
//! therefore repeats a step whose code changed, instead of taking its result from the store.
//!
//! A test (`src/layers.rs`) fails if a listed file imports a file that is not listed.

/// A step whose results the store keeps, and the step's code.
pub(crate) struct Step {
    /// The build script sets the environment variable `CODE_NAME` to the hash.
    pub name: &'static str,
    /// Files and folders, relative to `builder/`.
    pub code: &'static [&'static str],
    /// Steps whose keys are part of this step's key.
    pub inputs: &'static [&'static str],
}

/// All steps.
pub(crate) const STEPS: [Step; 7] = [
    Step {
        name: "COMPOSE",
        code: &[
            "src/compose",
            "src/sandbox",
            "src/format/deb.rs",
            "src/format/deb822.rs",
            "src/format/wheel.rs",
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
            "src/bake/context.rs",
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
