//! What can't cross to another process does not compile, and the compiler says why.

#[test]
fn types_that_can_not_cross_are_refused_at_compile_time() {
    trybuild::TestCases::new().compile_fail("tests/compile/*.rs");
}
