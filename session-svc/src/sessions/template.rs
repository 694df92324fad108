//! What a session starts from, and how large it becomes.

use std::{sync::Arc, time::Duration};

use proto::{
    session::v1 as wire,
    template::v1::{GetTemplateRequest, Template, template_service_client::TemplateServiceClient},
};
use service_kit::{
    ids::TeamId,
    mesh::{Caller, MeshChannel},
};
use tonic::Request;

use super::{Limits, SessionError};

const CALL_LIMIT: Duration = Duration::from_millis(1900);
/// Names may be moved to another version at any time; so long may a create lag behind.
const FRESH: Duration = Duration::from_secs(5);
const MOST_CPUS: u32 = 64;
const LEAST_MEMORY: u64 = 16 << 20;

/// Asks template-svc, and remembers for a moment.
#[derive(Debug, Clone)]
pub(super) struct Templates {
    service: TemplateServiceClient<MeshChannel>,
    cache: moka::future::Cache<(TeamId, String), Arc<Template>>,
}

impl Templates {
    pub(super) fn new(channel: MeshChannel) -> Self {
        Self {
            service: TemplateServiceClient::new(channel),
            cache: moka::future::Cache::builder()
                .max_capacity(1000)
                .time_to_live(FRESH)
                .build(),
        }
    }

    /// A template as the caller's team sees it. Many creates at once ask once.
    pub(super) async fn get(
        &self,
        caller: &Caller,
        name: &str,
    ) -> Result<Arc<Template>, SessionError> {
        let key = (caller.team.clone(), name.to_owned());
        let found = self.cache.try_get_with(key, async {
            let mut request = Request::new(GetTemplateRequest {
                template: name.to_owned(),
                ..GetTemplateRequest::default()
            });
            caller.apply(request.metadata_mut());
            request.set_timeout(CALL_LIMIT);
            let answer =
                tokio::time::timeout(CALL_LIMIT, self.service.clone().get_template(request))
                    .await
                    .unwrap_or_else(|_| Err(tonic::Status::unavailable("no answer in time")))?;
            let template = answer.into_inner().template;
            template
                .map(Arc::new)
                .ok_or_else(|| tonic::Status::internal("an answer without a template"))
        });
        found
            .await
            .map_err(|status| SessionError::Template(tonic::Status::clone(&status)))
    }
}

/// The size of a session: what was asked for, the template's for the rest, in whole MiB.
pub(super) fn sized(
    asked: wire::Resources,
    template: &Template,
    limits: &Limits,
) -> Result<wire::Resources, SessionError> {
    const MIB: u64 = 1 << 20;
    let or = |asked: u64, default: u64| if asked == 0 { default } else { asked };
    let whole = |bytes: u64| bytes.div_ceil(MIB).saturating_mul(MIB);
    let vcpus = if asked.vcpus == 0 {
        template.default_vcpus
    } else {
        asked.vcpus
    };
    let resources = wire::Resources {
        vcpus,
        memory_bytes: whole(or(asked.memory_bytes, template.default_memory_bytes)),
        disk_bytes: whole(or(asked.disk_bytes, template.default_disk_bytes)),
    };
    let invalid = |field, description| Err(SessionError::Invalid { field, description });
    if !(LEAST_MEMORY..=limits.max_memory).contains(&resources.memory_bytes) {
        let range = format!("must be from {LEAST_MEMORY} to {} bytes", limits.max_memory);
        return invalid("resources.memory_bytes", range);
    }
    if resources.disk_bytes > limits.max_disk {
        return invalid(
            "resources.disk_bytes",
            format!("must be at most {} bytes", limits.max_disk),
        );
    }
    if !(1..=MOST_CPUS).contains(&resources.vcpus) {
        return invalid("resources.vcpus", format!("must be from 1 to {MOST_CPUS}"));
    }
    Ok(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        start: Duration::ZERO,
        stop: Duration::ZERO,
        store: Duration::ZERO,
        paused_retention: Duration::ZERO,
        lease: Duration::ZERO,
        max_memory: 1 << 30,
        max_disk: 10 << 30,
    };

    fn size(vcpus: u32, memory_bytes: u64, disk_bytes: u64) -> wire::Resources {
        wire::Resources {
            vcpus,
            memory_bytes,
            disk_bytes,
        }
    }

    #[test]
    fn zero_is_the_templates_size_and_the_rest_is_whole_mebibytes() {
        let template = Template {
            default_vcpus: 2,
            default_memory_bytes: 256 << 20,
            default_disk_bytes: 1 << 30,
            ..Template::default()
        };
        let asked = |asked| sized(asked, &template, &LIMITS);
        assert_eq!(asked(size(0, 0, 0)).unwrap(), size(2, 256 << 20, 1 << 30));
        assert_eq!(
            asked(size(1, (64 << 20) + 1, 1)).unwrap(),
            size(1, 65 << 20, 1 << 20)
        );
        for (wrong, name) in [
            (size(65, 0, 0), "resources.vcpus"),
            (size(0, 1, 0), "resources.memory_bytes"),
            (size(0, u64::MAX, 0), "resources.memory_bytes"),
            (size(0, 0, u64::MAX), "resources.disk_bytes"),
        ] {
            match asked(wrong) {
                Err(SessionError::Invalid { field, .. }) => assert_eq!(field, name),
                other => panic!("{wrong:?}: {other:?}"),
            }
        }
    }
}
