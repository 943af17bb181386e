//! Low-rank adapters: where they sit, merge, project.
