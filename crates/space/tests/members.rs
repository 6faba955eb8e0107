//! The address space over real processes.

mod killed;

use killed::{Scene, at_every_step, at_random_instructions};
use peregrine_space::process::Filling;
use testkit::{Outcome, Rng};

fn kill_at_steps(filling: Filling) -> Outcome {
    let mut scene = Scene::new(filling);
    let kills = at_every_step(&mut scene);
    println!("{kills} kills at steps");
    assert!(kills > 50, "the deeds have more steps than {kills}");
    Outcome::Passed
}

fn kill_at_instructions(filling: Filling) -> Outcome {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let kills = at_random_instructions(&mut Scene::new(filling), &mut Rng::new(seed), 40);
    println!("{kills} kills between instructions");
    Outcome::Passed
}

fn a_member_of_a_kernel_filled_space_can_be_killed_at_every_step() -> Outcome {
    kill_at_steps(Filling::Kernel)
}

fn a_member_of_a_trap_filled_space_can_be_killed_at_every_step() -> Outcome {
    kill_at_steps(Filling::Trap)
}

fn a_member_of_a_kernel_filled_space_can_be_killed_between_any_two_instructions() -> Outcome {
    kill_at_instructions(Filling::Kernel)
}

fn a_member_of_a_trap_filled_space_can_be_killed_between_any_two_instructions() -> Outcome {
    kill_at_instructions(Filling::Trap)
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_member_of_a_kernel_filled_space_can_be_killed_at_every_step,
        a_member_of_a_trap_filled_space_can_be_killed_at_every_step,
        a_member_of_a_kernel_filled_space_can_be_killed_between_any_two_instructions,
        a_member_of_a_trap_filled_space_can_be_killed_between_any_two_instructions,
    ])
}
