//! Golden files, and the seeds of the fuzz targets. These tests need no image and no root.

mod alerts;
mod fuzz;
mod golden;
mod runbooks;
