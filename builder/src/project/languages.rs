//! What the languages of `fleet.toml` add to a profile.

use fleet::Profile;

/// Adds the translations and fonts of the fleet's languages to a profile.
pub(super) fn add(profile: &mut Profile, languages: &[String]) {
    for language in languages {
        // A regional variant needs its base language: pt_BR needs pt.
        let parent = language.split_once(['_', '@']).map(|(parent, _)| parent);
        for name in std::iter::once(language.as_str()).chain(parent) {
            let patterns = profile.trim.languages.iter().map(|pattern| pattern.replace("LANGUAGE", name));
            let patterns: Vec<String> = patterns.collect();
            profile.trim.include.extend(patterns);
        }
        let fonts = profile.fonts.get(language).or_else(|| profile.fonts.get(parent?));
        if let Some(fonts) = fonts.cloned() {
            profile.packages.extend(fonts.packages);
            profile.trim.include.extend(fonts.files);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn language_brings_its_fonts_or_those_of_its_base() {
        let toml = b"packages = []\n[trim]\nlanguages = [\"/i18n/LANGUAGE.po\"]\n[fonts]\n\
            zh = { packages = [\"fonts-noto-cjk\"], files = [\"/usr/share/fonts/CJK.ttc\"] }\n\
            ar = { packages = [\"fonts-noto-core\"] }\n";
        let mut profile = Profile::parse("app.toml", toml).unwrap();
        add(&mut profile, &["de".to_owned(), "zh_CN".to_owned()]);
        assert_eq!(profile.packages, ["fonts-noto-cjk"]);
        let kept = ["/i18n/de.po", "/i18n/zh_CN.po", "/i18n/zh.po", "/usr/share/fonts/CJK.ttc"];
        assert_eq!(profile.trim.include, kept);
    }
}
