//! Tables, plots, page.
