//! Test of the style sheet's colours: WCAG 2.2, success criteria 1.4.3 (text, 4.5:1) and 1.4.11 (graphics, 3:1).

use std::collections::BTreeMap;

const STYLE: &str = include_str!("../static/page.css");

/// Colours by name, of the light and of the dark scheme.
fn schemes() -> [BTreeMap<&'static str, [f64; 3]>; 2] {
    let blocks: Vec<&str> = STYLE.split(":root {").skip(1).take(2).collect();
    let read = |block: &'static str| {
        let lines = block.split('}').next().unwrap_or_default().lines();
        let pairs = lines.filter_map(|line| line.trim().strip_prefix("--")?.strip_suffix(';')?.split_once(": #"));
        let part = |text: &str, at: usize| f64::from(u8::from_str_radix(&text[at..at + 2], 16).unwrap());
        pairs.map(|(name, text)| (name, [part(text, 0), part(text, 2), part(text, 4)])).collect()
    };
    [read(blocks[0]), read(blocks[1])]
}

/// Returns the relative luminance of a colour.
fn luminance(colour: [f64; 3]) -> f64 {
    let linear = |part: f64| {
        let part = part / 255.0;
        if part <= 0.040_45 { part / 12.92 } else { ((part + 0.055) / 1.055).powf(2.4) }
    };
    0.2126 * linear(colour[0]) + 0.7152 * linear(colour[1]) + 0.0722 * linear(colour[2])
}

fn contrast(one: [f64; 3], other: [f64; 3]) -> f64 {
    let (one, other) = (luminance(one), luminance(other));
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}

#[test]
fn colours_have_the_contrast_of_wcag_aa() {
    let surfaces = ["back", "card", "inset", "warn-back", "bad-back"];
    for (scheme, colours) in ["light", "dark"].iter().zip(schemes()) {
        assert!(colours.len() > 20, "{scheme}: {colours:?}");
        let check = |text: &str, surface: &str, least: f64| {
            let found = contrast(colours[text], colours[surface]);
            assert!(found >= least, "{scheme}: {text} on {surface} has {found:.2}, and needs {least}");
        };
        for surface in surfaces {
            for text in ["text", "dim"] {
                check(text, surface, 4.5);
            }
        }
        for text in ["accent", "good", "warn", "bad", "none"] {
            for surface in ["card", "back"] {
                check(text, surface, 4.5);
            }
            // Texts on coloured badges and buttons.
            check("mark", text, 4.5);
        }
        for (text, surface) in
            [("good", "good-back"), ("warn", "warn-back"), ("bad", "bad-back"), ("accent", "warn-back")]
        {
            check(text, surface, 4.5);
        }
        check("accent", "bad-back", 4.5);
        check("dim", "none-back", 4.5);
        check("text", "none-back", 4.5);
        for line in ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"] {
            check(line, "card", 3.0);
        }
        check("wire", "card", 1.5);
    }
}
