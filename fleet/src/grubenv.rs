//! GRUB's environment block, in which it counts a new image's tries where a legacy BIOS starts the machine.

/// GRUB's environment block, below the EFI partition.
pub const BLOCK: &str = "grub/grubenv";
/// How often a new image is tried.
pub const TRIES: u32 = 3;

/// What a block begins with; the rest is lines of `name=value`, filled up with `#`.
const HEAD: &str = "# GRUB Environment Block\n";
const SIZE: usize = 1024;

/// Names of images that a block has no room for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{good} and {next} don't fit in GRUB's environment block")]
pub struct TooLong {
    good: String,
    next: String,
}

/// What GRUB knows: entries are names of images (`ID_VERSION`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// The image that it starts.
    pub good: String,
    /// A newer one, which it tries first while there are tries.
    pub next: String,
    pub tries: u32,
}

impl Block {
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let value = |name: &str| {
            text.split('\n').find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default().to_owned()
        };
        Self { good: value("good"), next: value("next"), tries: value("tries").parse().unwrap_or(0) }
    }

    /// Returns the block's bytes.
    ///
    /// # Errors
    /// The names are too long.
    pub fn render(&self) -> Result<Vec<u8>, TooLong> {
        let Self { good, next, tries } = self;
        let mut bytes = format!("{HEAD}good={good}\nnext={next}\ntries={tries}\n").into_bytes();
        // What changes is in one sector, which a disk writes whole or not at all.
        if bytes.len() > SIZE / 2 {
            return Err(TooLong { good: good.clone(), next: next.clone() });
        }
        bytes.resize(SIZE, b'#');
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_of_grubs_form() {
        let bytes = Block { good: "a_1".into(), next: "a_2".into(), tries: 3 }.render().unwrap();
        assert_eq!(bytes.len(), SIZE);
        assert!(bytes.starts_with(b"# GRUB Environment Block\ngood=a_1\nnext=a_2\ntries=3\n####"));
        assert!(Block { good: "x".repeat(600), ..Block::default() }.render().is_err());
    }

    #[test]
    fn keeps_carriage_return_of_last_line() {
        let block = Block::parse("# M\ngood=a\r");
        assert_eq!(Block::parse(std::str::from_utf8(&block.render().unwrap()).unwrap()), block);
    }

    proptest::proptest! {
        #[test]
        fn rendered_block_parses_to_itself(text in "(good=[a-z\r=]{0,9}\n|next=.{0,9}\n|tries=[0-9-]{0,3}\n|\\PC){0,6}") {
            let block = Block::parse(&text);
            let rendered = block.render().unwrap();
            proptest::prop_assert_eq!(Block::parse(std::str::from_utf8(&rendered).unwrap()), block);
        }
    }
}
