//! What a legacy BIOS runs from the disk: a line that says that it can't start a node.

/// Room for a program in the master boot record.
const ROOM: usize = 440;
const TEXT: &str = "\r\nbakehouse: this disk needs UEFI firmware. This machine started it by its legacy BIOS: switch its \
                    settings to UEFI (often called CSM or legacy boot, off).\r\n\0";
/// Where a BIOS loads the record.
const ORIGIN: u16 = 0x7c00;

/// Prints the text, letter by letter, and waits for ever.
#[must_use]
pub fn program() -> [u8; ROOM] {
    const LENGTH: usize = 25;
    let [low, high] = (ORIGIN + LENGTH as u16).to_le_bytes();
    let code: [u8; LENGTH] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xfc, // cld
        0xbe, low, high, // mov si, TEXT
        0xac, // next: lodsb
        0x08, 0xc0, // or al, al
        0x74, 0x09, // jz stop
        0xb4, 0x0e, // mov ah, 0eh: write a letter
        0xbb, 0x07, 0x00, // mov bx, 7: page, colour
        0xcd, 0x10, // int 10h
        0xeb, 0xf2, // jmp next
        0xf4, // stop: hlt
        0xeb, 0xfd, // jmp stop
    ];
    let mut room = [0; ROOM];
    room[..LENGTH].copy_from_slice(&code);
    room[LENGTH..LENGTH + TEXT.len()].copy_from_slice(TEXT.as_bytes());
    room
}
