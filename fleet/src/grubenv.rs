//! GRUB's environment block. On machines with a legacy BIOS, GRUB counts the tries of a new image in it.

/// Path of the block in the EFI partition.
pub const BLOCK: &str = "grub/grubenv";
/// Number of times that GRUB tries a new image.
pub const TRIES: u32 = 3;

/// First line of a block. Lines of `name=value` follow, and `#` up to the size.
const HEAD: &str = "# GRUB Environment Block\n";
const SIZE: usize = 1024;

/// Names of images that do not fit in a block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the image names `{good}` and `{next}` do not fit in GRUB's environment block; shorten `name` or `version`")]
pub struct TooLong {
    good: String,
    next: String,
}

/// Variables of the block. Entries are names of images (`ID_VERSION`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Image that GRUB starts.
    pub good: String,
    /// Newer image that GRUB starts instead while `tries` is more than 0; may be empty.
    pub next: String,
    /// Tries of `next` that are left.
    pub tries: u32,
}

impl Block {
    /// Parses a block. Missing variables are empty.
    ///
    /// # Examples
    ///
    /// ```
    /// use fleet::grubenv::{Block, TRIES};
    ///
    /// let block = Block { good: "acme-db_1".to_owned(), next: "acme-db_2".to_owned(), tries: TRIES };
    /// let bytes = block.render()?;
    /// assert_eq!(bytes.len(), 1024);
    /// assert_eq!(Block::parse(std::str::from_utf8(&bytes)?), block);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
    /// If the names are too long for the block.
    pub fn render(&self) -> Result<Vec<u8>, TooLong> {
        let Self { good, next, tries } = self;
        let mut bytes = format!("{HEAD}good={good}\nnext={next}\ntries={tries}\n").into_bytes();
        // The variables are in one sector, which a disk writes atomically.
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
    fn rendered_block_has_grubs_format() {
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
