"""The maths of flow matching over an abstract velocity: schedules, solvers, guidance, sliding windows."""
