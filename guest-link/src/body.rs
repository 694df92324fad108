//! Bodies of HTTP/2 messages as they are passed on.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Its sender reset the stream before its end.
#[derive(Debug, thiserror::Error)]
#[error("the sender broke off before the end")]
pub struct BrokeOff;

pin_project! {
    /// A body that ends with an error if its sender broke off. hyper lets one that was cancelled end like any other (1.12, body/incoming.rs), and
    /// passed on like that half a file would look whole.
    #[derive(Debug)]
    pub struct Whole<B> {
        #[pin]
        inner: B,
    }
}

impl<B> Whole<B> {
    /// Around a body as hyper gives it.
    pub fn new(inner: B) -> Self {
        Self { inner }
    }
}

impl<B: Body> Body for Whole<B>
where
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let mut inner = self.project().inner;
        match inner.as_mut().poll_frame(cx) {
            Poll::Ready(None) if !inner.is_end_stream() => Poll::Ready(Some(Err(BrokeOff.into()))),
            ready => ready.map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
