//! What `#[peregrine::test]` promises.

#[peregrine::test]
fn a_test_runs_as_the_main_of_a_world() {
    assert!(peregrine::current().is_some());
    assert_eq!(peregrine::spawn(|n: u32| n + 1, 41).join().unwrap(), 42);
}

#[peregrine::test(nodes = 3, image_interval_ms = 7)]
fn settings_of_the_attribute_reach_the_world() -> Result<(), std::num::ParseIntError> {
    assert_eq!(peregrine::node_count(), "3".parse::<u32>()?);
    Ok(())
}

#[peregrine::test(program)]
fn fails() {
    println!("printed before");
    panic!("on purpose");
}

#[test]
fn a_failure_is_seen_with_what_was_printed() {
    let outcome = fails().run();
    assert_eq!(outcome.code, Some(101), "{outcome}");
    assert!(outcome.stdout.contains("printed before"), "{outcome}");
    assert!(outcome.stderr.contains("on purpose"), "{outcome}");
}

#[peregrine::test(program)]
fn returns_an_error() -> Result<(), String> {
    Err("no luck".into())
}

#[test]
fn an_error_from_main_is_shown_and_fails() {
    let outcome = returns_an_error().run();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("no luck"), "{outcome}");
}

#[peregrine::test(program, timeout_s = 1)]
fn hangs() {
    loop {
        std::hint::spin_loop();
    }
}

#[test]
fn a_test_that_hangs_is_killed() {
    let outcome = hangs().run();
    assert!(outcome.timed_out.is_some(), "{outcome}");
}

#[peregrine::test(program)]
fn exits_with_seven() {
    print!("last words");
    std::process::exit(7);
}

#[test]
fn process_exit_ends_the_program_with_its_code_and_its_output() {
    let outcome = exits_with_seven().run();
    assert_eq!(outcome.code, Some(7), "{outcome}");
    assert_eq!(outcome.stdout, "last words", "{outcome}");
}

#[peregrine::test(program, nodes = 2, kill_every_ms = 20, image_interval_ms = 5, least_kills = 10)]
fn is_over_at_once() {
    println!("once");
    peregrine::sleep(std::time::Duration::from_millis(1));
}

#[test]
fn a_test_that_ends_before_what_it_needs_has_happened_is_run_again() {
    let outcome = is_over_at_once().run();
    assert!(outcome.success(), "{outcome}");
    assert!(outcome.stdout.lines().count() > 1, "{outcome}");
    let kills = outcome.stderr.split(" kills").next().and_then(|before| before.split(' ').next_back());
    assert!(kills.and_then(|n| n.parse().ok()) >= Some(10), "{outcome}");
}

#[peregrine::test(program, nodes = 2, kill_every_ms = 3_600_000, least_kills = 1)]
fn ends_the_process_itself() {
    std::process::exit(0);
}

#[test]
fn a_test_whose_conditions_did_not_arise_does_not_count() {
    let outcome = ends_the_process_itself().run();
    assert_eq!(outcome.code, Some(75), "{outcome}");
}
