//! Layers are applied as the OCI image specification says: each case, file by file with all metadata, against what `umoci` makes of the same image;
//! what hostile layers try does not come about; and an image is what its digests say.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod layout;
mod tree;

mod conformance;
mod hostile;
mod images;
