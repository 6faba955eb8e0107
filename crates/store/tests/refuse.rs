//! Directories that are no stores, and stores that can't be made.

mod scene;

use peregrine_store::*;
use scene::*;
use std::fs;

#[test]
fn a_path_that_is_no_store_is_refused_with_its_reason() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("file");
    fs::write(&file, "x").unwrap();
    let cases = [
        (scratch.path().join("nothing"), "there is nothing"),
        (file.clone(), "not a directory"),
        (scratch.path().to_path_buf(), "no file named format"),
    ];
    for (path, why) in cases {
        let refused = Store::open(&path).unwrap_err();
        assert!(matches!(refused, StoreError::NotAStore { .. }), "{refused}");
        assert!(
            refused.to_string().contains(why) && refused.to_string().contains(path.to_str().unwrap()),
            "{refused}"
        );
    }
    let refused = Store::open(file.join("below")).unwrap_err().to_string();
    assert!(refused.contains("name a directory"), "{refused}");
}

#[test]
fn a_store_is_not_made_over_anything() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("store");
    drop(create(scratch.path(), &dir).unwrap());
    let refused = create(scratch.path(), &dir).unwrap_err();
    assert!(matches!(refused, StoreError::Exists { world: WORLD, .. }), "{refused}");

    let refused = create(scratch.path(), scratch.path()).unwrap_err();
    assert!(matches!(&refused, StoreError::NotEmpty { .. }), "{refused}");
    let refused = create(scratch.path(), &scratch.path().join("program")).unwrap_err().to_string();
    assert!(refused.contains("move it away"), "{refused}");
    let refused = create(scratch.path(), &scratch.path().join("a/b")).unwrap_err().to_string();
    assert!(refused.contains("name the right one"), "{refused}");

    // A store that lost its format is not taken for an empty directory.
    let dir = scratch.path().join("lost");
    let other = tempfile::tempdir().unwrap();
    copy(&store_with(other.path(), 1), &dir);
    fs::remove_file(dir.join("format")).unwrap();
    let refused = create(scratch.path(), &dir).unwrap_err();
    assert!(matches!(refused, StoreError::NotEmpty { .. }), "{refused}");
}

#[test]
fn an_executable_that_is_not_the_build_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let (program, _) = program(scratch.path());
    let dir = scratch.path().join("store");
    let refused = Store::create(&dir, WORLD, &program, BuildId::from_bytes([0; 32])).unwrap_err();
    assert!(matches!(refused, StoreError::WrongExecutable { .. }), "{refused}");
    let refused =
        Store::create(&dir, WORLD, &scratch.path().join("none"), BuildId::from_bytes([0; 32])).unwrap_err();
    assert!(refused.to_string().contains("none"), "{refused}");
    create(scratch.path(), &dir).unwrap();
}
