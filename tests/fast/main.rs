//! Golden files, and the seeds of the fuzz targets. These tests need no image and no root.

mod fuzz;
mod golden;
