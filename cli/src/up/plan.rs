//! Addresses and settings of a deployment on one machine. Decided once, before anything starts.

use std::{
    net::{SocketAddr, TcpListener},
    os::{linux::net::SocketAddrExt as _, unix::net},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use rand::RngExt as _;
use service_kit::config::tools_folder;

use super::Options;

/// Everything that is decided.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) state: PathBuf,
    pub(super) edge: SocketAddr,
    pub(super) envoy_admin: SocketAddr,
    pub(super) control: SocketAddr,
    pub(super) gateway: SocketAddr,
    /// Where this process serves /metrics of the services it hosts.
    pub(super) admin: SocketAddr,
    pub(super) domain: String,
    pub(super) otlp: Option<SocketAddr>,
    pub(super) services: Vec<ServicePlan>,
    ports: Ports,
}

/// One service: what `sandmesh serve` is given.
#[derive(Debug, Clone)]
pub(super) struct ServicePlan {
    /// As status shows it.
    pub(super) name: String,
    /// As `serve` knows it.
    pub(super) service: &'static str,
    pub(super) arguments: Vec<String>,
    /// Where it is reached.
    pub(super) address: String,
    /// Where its process serves /metrics.
    pub(super) admin: SocketAddr,
}

impl ServicePlan {
    /// Where Prometheus finds its metrics.
    pub(super) fn metrics(&self) -> String {
        format!("http://{}/metrics", self.admin)
    }
}

const FREE_PORTS: std::ops::Range<u16> = 12_000..32_000;
const FREE_TRIES: u32 = 100;

/// Ports that were chosen: an abstract socket (unix(7)) named after each, for as long as this process lives. Until its service listens, and while
/// that is restarted, a port looks free to another deployment that starts.
#[derive(Debug, Default)]
struct Ports(Vec<net::UnixListener>);

impl Ports {
    /// A port nobody uses right now. Below those that the kernel gives to outgoing connections (`ip_local_port_range` of ip(7)): one of those
    /// could take it before its service does, or while that is restarted.
    fn free(&mut self) -> anyhow::Result<SocketAddr> {
        for _ in 0..FREE_TRIES {
            let port = rand::rng().random_range(FREE_PORTS);
            if self.claim(port) {
                return Ok(SocketAddr::from(([127, 0, 0, 1], port)));
            }
        }
        anyhow::bail!("no port from {FREE_PORTS:?} is free on 127.0.0.1")
    }

    fn claim(&mut self, port: u16) -> bool {
        let name = format!("sandmesh-port-{port}");
        let claimed = net::SocketAddr::from_abstract_name(name)
            .and_then(|name| net::UnixListener::bind_addr(&name));
        let is_free = TcpListener::bind(("127.0.0.1", port)).is_ok();
        claimed.is_ok_and(|claim| {
            if is_free {
                self.0.push(claim);
            }
            is_free
        })
    }
}

impl Plan {
    pub(super) fn make(state: &Path, options: &Options) -> anyhow::Result<Self> {
        let mut ports = Ports::default();
        let mut edge = options.edge;
        if edge.port() == 0 {
            edge.set_port(ports.free()?.port());
        }
        let mut plan = Self {
            state: state.to_owned(),
            edge,
            envoy_admin: ports.free()?,
            control: ports.free()?,
            gateway: ports.free()?,
            admin: ports.free()?,
            ports,
            domain: options.domain.clone(),
            otlp: options.otlp,
            services: Vec::new(),
        };
        plan.add_services(options)?;
        Ok(plan)
    }

    fn run(&self, name: &str) -> String {
        format!("unix:{}", self.state.join("run").join(name).display())
    }

    pub(super) fn database_url(&self) -> String {
        format!(
            "postgres://postgres@localhost/postgres?host={}",
            self.state.join("run").display()
        )
    }

    pub(super) fn redis_socket(&self) -> PathBuf {
        self.state.join("run/redis.sock")
    }

    fn add_services(&mut self, options: &Options) -> anyhow::Result<()> {
        let flag = |name: &str, value: &str| [format!("--{name}"), value.to_owned()];
        let token = self.state.join("mesh.token");
        let token = flag("mesh-token-file", &token.to_string_lossy());
        let database = flag("database-url", &self.database_url());
        let redis = flag(
            "redis-url",
            &format!("redis+unix://{}", self.redis_socket().display()),
        );
        let sessions: Vec<String> = (1..=options.session_replicas)
            .map(|number| self.run(&format!("session-{number}.sock")))
            .collect();
        let session_list = flag("session-addresses", &sessions.join(","));
        let template = self.run("template.sock");
        let template_list = flag("template-addresses", &template);
        let operators = self.run("operators.sock");
        let cache = tools_folder();
        let otlp = options
            .otlp
            .map(|otlp| flag("otlp-endpoint", &format!("http://{otlp}")));
        let admin = self.admin;
        let mut services: Vec<ServicePlan> = Vec::new();
        let mut add =
            |more: Vec<String>, name: String, service, address: &str, flags: &[&[String; 2]]| {
                let flags = flags.iter().copied().chain(&otlp);
                let arguments = flags.flatten().cloned().chain(more).collect();
                services.push(ServicePlan {
                    name,
                    service,
                    arguments,
                    address: address.to_owned(),
                    admin,
                });
            };
        let kernel = cache.join("guest-kernel/current");
        let trusted = options.trusted_registries.iter();
        let store = if let Some(store) = &options.store {
            store.to_string()
        } else {
            let folder = std::path::absolute(self.state.join("templates/store"))?;
            folder.display().to_string()
        };
        let store = flag("store", &store);
        add(
            trusted
                .flat_map(|one| flag("trusted-registries", &one.to_string()))
                .collect(),
            "template".into(),
            "template",
            &template,
            &[
                &flag("listen", &template),
                &database,
                &token,
                &flag("state", &self.state.join("templates").to_string_lossy()),
                &flag("kernel-dir", &kernel.to_string_lossy()),
                &store,
                &session_list,
            ],
        );
        for (number, address) in (1..).zip(&sessions) {
            let name = if number == 1 {
                "session".to_owned()
            } else {
                format!("session-{number}")
            };
            add(
                Vec::new(),
                name,
                "session",
                address,
                &[
                    &flag("listen", address),
                    &database,
                    &redis,
                    &token,
                    &template_list,
                    &flag("domain", &self.domain),
                    &flag("edge-port", &self.edge.port().to_string()),
                    &flag("node-dead-after", &options.node_dead_after),
                ],
            );
        }
        let gateway = self.gateway.to_string();
        add(
            Vec::new(),
            "gateway".into(),
            "gateway",
            &gateway,
            &[
                &flag("listen", &gateway),
                &flag("operator-listen", &operators),
                &database,
                &token,
                &session_list,
                &template_list,
            ],
        );
        add(
            Vec::new(),
            "envoy-control".into(),
            "envoy",
            &self.control.to_string(),
            &[
                &flag("listen", &self.control.to_string()),
                &token,
                &session_list,
            ],
        );
        let envd = match &options.envd {
            Some(envd) => envd.clone(),
            None => std::env::current_exe()?
                .parent()
                .context("no folder of this program")?
                .join("envd"),
        };
        let envd = std::path::absolute(envd)?;
        for number in 1..=options.nodes {
            let name = if number == 1 {
                "node".to_owned()
            } else {
                format!("node-{number}")
            };
            let (ingress, internal) = (
                self.ports.free()?.to_string(),
                self.ports.free()?.to_string(),
            );
            let state = self.state.join(&name);
            let mut arguments: Vec<[String; 2]> = vec![
                flag("ingress", &ingress),
                flag("internal", &internal),
                token.clone(),
                redis.clone(),
                store.clone(),
                session_list.clone(),
                template_list.clone(),
                flag("domain", &self.domain),
                flag("state", &state.to_string_lossy()),
                flag("vmm", options.vmm.name()),
                flag("envd", &envd.to_string_lossy()),
                flag("max-sessions", &options.max_sessions.to_string()),
                flag("trial-kernel", &kernel.join("vmlinux").to_string_lossy()),
            ];
            if let Some(memory) = options.memory {
                arguments.push(flag("memory", &format!("{memory}B")));
            }
            if let Some(vcpus) = options.vcpus {
                arguments.push(flag("vcpus", &vcpus.to_string()));
            }
            if let Some(cache) = options.cache {
                arguments.push(flag("cache", &format!("{cache}B")));
            }
            let flags: Vec<&[String; 2]> = arguments.iter().collect();
            add(
                vec!["--stop-sessions-on-exit".into()],
                name,
                "node",
                &ingress,
                &flags,
            );
        }
        if options.separate {
            for service in &mut services {
                service.admin = self.ports.free()?;
                let admin = flag("admin-address", &service.admin.to_string());
                service.arguments.extend(admin);
            }
        }
        self.services = services;
        Ok(())
    }

    /// State folders of the nodes, for cleaning up after them.
    pub(super) fn node_states(state: &Path) -> Vec<PathBuf> {
        (1..=8)
            .map(|number| {
                state.join(if number == 1 {
                    "node".to_owned()
                } else {
                    format!("node-{number}")
                })
            })
            .collect()
    }

    pub(super) fn operators_address(&self) -> String {
        self.run("operators.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_chosen_by_one_deployment_at_a_time() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let mut first = Ports::default();
        assert!(!first.claim(listener.local_addr().unwrap().port()));
        let port = first.free().unwrap().port();
        let mut second = Ports::default();
        assert!(!first.claim(port) && !second.claim(port));
        drop(first);
        assert!(second.claim(port));
    }
}
