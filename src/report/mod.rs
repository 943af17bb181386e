//! Tables, plots, page.
/// stand-in
pub mod run {
    /// s
    pub fn refresh(_: &std::path::Path, _: &str, _: &[crate::train::record::HistoryRow]) -> crate::Result<()> {
        Ok(())
    }
    /// s
    pub fn finish(_: &std::path::Path, _: &crate::train::record::RunRecord) -> crate::Result<()> {
        Ok(())
    }
}
