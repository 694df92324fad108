//! Envoy's bootstrap: how it listens and routes, and where it asks for the nodes.
//!
//! Routing knows no session. `header_to_metadata` takes the home tag, the first five characters of a session ID, from
//! `x-session-id` or the authority; a subset load balancer picks the node that has this tag from one EDS cluster of all nodes. A
//! tag that nobody has falls to any node, which forwards or explains.

use std::net::SocketAddr;

use data_encoding::BASE64_NOPAD;
use serde_json::{Value, json};
use service_kit::{
    errors::{Failure, Reason},
    mesh::{MeshToken, TOKEN_HEADER},
};

/// What a bootstrap is made from.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// Name of this Envoy in the control plane's logs.
    pub node_id: String,
    /// Where users reach it.
    pub edge: SocketAddr,
    /// Its admin listener.
    pub admin: SocketAddr,
    /// The control plane.
    pub control: SocketAddr,
    /// Gateways, at least one.
    pub gateways: Vec<SocketAddr>,
    /// Domain of sandbox hosts.
    pub domain: String,
    /// Trace collector (gRPC).
    pub otlp: Option<SocketAddr>,
    /// Connections from users at most.
    pub max_connections: u64,
}

const HCM: &str = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const HTTP_OPTIONS: &str =
    "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// Set by Sandmesh's own parts only; whatever a user sends under these names is dropped before routing.
const INTERNAL_HEADERS: [&str; 6] = [
    "x-sandmesh-mesh",
    "x-sandmesh-team",
    "x-sandmesh-key",
    "x-sandmesh-operator",
    "x-sandmesh-hop",
    "x-sandmesh-authority",
];

impl Bootstrap {
    /// The file Envoy starts from. It holds a secret: write it with mode 0600.
    pub fn render(&self, token: &MeshToken) -> Value {
        let mut clusters = vec![
            self.control_cluster(),
            node_cluster(),
            self.gateway_cluster(),
        ];
        clusters.extend(self.otlp.map(|otlp| {
            static_cluster(
                "otlp",
                &[otlp],
                &json!({"explicit_http_config": {"http2_protocol_options": {}}}),
            )
        }));
        json!({
            "node": {"id": self.node_id, "cluster": "edge"},
            "admin": {"address": address(self.admin)},
            "dynamic_resources": {
                "ads_config": {
                    "api_type": "GRPC",
                    "transport_api_version": "V3",
                    "set_node_on_first_message_only": true,
                    "grpc_services": [{
                        "envoy_grpc": {"cluster_name": "control"},
                        "initial_metadata": [{"key": TOKEN_HEADER, "value": token.header()}],
                    }],
                },
            },
            "static_resources": {"listeners": [self.listener()], "clusters": clusters},
            "overload_manager": {
                "resource_monitors": [{
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": self.max_connections,
                    },
                }],
            },
        })
    }

    fn listener(&self) -> Value {
        json!({
            "name": "edge",
            "address": address(self.edge),
            "per_connection_buffer_limit_bytes": 1 << 20,
            "filter_chains": [{"filters": [{
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": self.connection_manager(),
            }]}],
        })
    }

    fn connection_manager(&self) -> Value {
        let mut manager = json!({
            "@type": HCM,
            "stat_prefix": "edge",
            "codec_type": "AUTO",
            // Terminals and watches may be silent for hours.
            "stream_idle_timeout": "0s",
            "request_headers_timeout": "10s",
            "use_remote_address": true,
            "generate_request_id": true,
            "preserve_external_request_id": true,
            "always_set_request_id_in_response": true,
            // Bytes of sandbox ports pass as they are; the API's paths are fixed strings, so nothing is won by changing them either.
            "normalize_path": false,
            "merge_slashes": false,
            "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
            "common_http_protocol_options": {"headers_with_underscores_action": "ALLOW", "idle_timeout": "3600s"},
            "http2_protocol_options": {
                "allow_connect": true,
                "max_concurrent_streams": 10_000,
                "initial_stream_window_size": 1 << 20,
                "initial_connection_window_size": 16 << 20,
            },
            "upgrade_configs": [{"upgrade_type": "websocket"}],
            "early_header_mutation_extensions": [{
                "name": "envoy.http.early_header_mutation.header_mutation",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": INTERNAL_HEADERS.map(|name| json!({"remove": name})),
                },
            }],
            "local_reply_config": local_replies(&self.domain),
            "access_log": [access_log()],
            "http_filters": [
                {"name": "envoy.filters.http.header_to_metadata", "typed_config": home_tag()},
                {
                    "name": "envoy.filters.http.router",
                    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
                },
            ],
            "route_config": self.routes(),
        });
        if self.otlp.is_some() {
            manager["tracing"] = json!({
                "provider": {
                    "name": "envoy.tracers.opentelemetry",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
                        "grpc_service": {"envoy_grpc": {"cluster_name": "otlp"}, "timeout": "1s"},
                        "service_name": "envoy",
                    },
                },
                "spawn_upstream_span": true,
            });
        }
        manager
    }

    fn routes(&self) -> Value {
        let to_node = json!({
            "cluster": "nodes",
            // A default of 15 s would cut every stream.
            "timeout": "0s",
            // Only what has not reached the node is tried again.
            "retry_policy": {"retry_on": "connect-failure", "num_retries": 1, "retry_back_off": {"base_interval": "0.025s"}},
        });
        let to_gateway = json!({
            "cluster": "gateway",
            "timeout": "0s",
            "retry_policy": {"retry_on": "connect-failure", "num_retries": 2, "retry_back_off": {"base_interval": "0.025s"}},
        });
        json!({
            "name": "edge",
            // Matched without its port, but passed on with it: servers in sandboxes make addresses from it.
            "ignore_port_in_host_matching": true,
            "virtual_hosts": [
                {
                    "name": "sandboxes",
                    "domains": [format!("*.{}", self.domain)],
                    "routes": [
                        {"name": "sandbox-connect", "match": {"connect_matcher": {}}, "route": with_connect(&to_node)},
                        {"name": "sandbox", "match": {"prefix": "/"}, "route": to_node.clone()},
                    ],
                },
                {
                    "name": "api",
                    "domains": ["*"],
                    "routes": [
                        {
                            "name": "stream",
                            "match": {"prefix": "/", "headers": [{"name": "x-session-id", "present_match": true}]},
                            "route": to_node,
                        },
                        {"name": "api", "match": {"prefix": "/"}, "route": to_gateway},
                    ],
                },
            ],
        })
    }

    fn gateway_cluster(&self) -> Value {
        let options = json!({"use_downstream_protocol_config": {
            "http_protocol_options": {},
            "http2_protocol_options": {"connection_keepalive": {"interval": "30s", "timeout": "5s"}},
        }});
        let mut cluster = static_cluster("gateway", &self.gateways, &options);
        cluster["circuit_breakers"] = wide_open();
        cluster["outlier_detection"] = json!({
            "consecutive_local_origin_failure": 2,
            "split_external_local_origin_errors": true,
            "interval": "1s",
            "base_ejection_time": "2s",
            "max_ejection_percent": 50,
        });
        cluster
    }

    fn control_cluster(&self) -> Value {
        let options = json!({"explicit_http_config": {"http2_protocol_options": {
            "connection_keepalive": {"interval": "10s", "timeout": "5s"},
        }}});
        static_cluster("control", &[self.control], &options)
    }
}

fn node_cluster() -> Value {
    json!({
        "name": "nodes",
        "type": "EDS",
        "eds_cluster_config": {"eds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}},
        "connect_timeout": "1s",
        "lb_subset_config": {
            "fallback_policy": "ANY_ENDPOINT",
            "subset_selectors": [{"keys": ["node"], "single_host_per_subset": true}],
        },
        // A silent node keeps its sessions; only the registry says when it is dead.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "circuit_breakers": wide_open(),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": HTTP_OPTIONS,
                "use_downstream_protocol_config": {
                    "http_protocol_options": {},
                    "http2_protocol_options": {
                        "allow_connect": true,
                        "max_concurrent_streams": 10_000,
                        "initial_stream_window_size": 1 << 20,
                        "initial_connection_window_size": 16 << 20,
                        "connection_keepalive": {"interval": "30s", "timeout": "5s"},
                    },
                },
            },
        },
    })
}

fn with_connect(route: &Value) -> Value {
    let mut route = route.clone();
    route["upgrade_configs"] = json!([{"upgrade_type": "websocket"}]);
    route
}

fn static_cluster(name: &str, endpoints: &[SocketAddr], options: &Value) -> Value {
    let mut options = options.clone();
    options["@type"] = HTTP_OPTIONS.into();
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| json!({"endpoint": {"address": address(*endpoint)}}))
        .collect();
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    })
}

fn wide_open() -> Value {
    // The defaults of 1,024 each would refuse what the machine can carry.
    json!({"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 1_000_000, "max_retries": 1000}]})
}

fn address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// The later rule wins where both match: a header is more explicit than a host.
fn home_tag() -> Value {
    let rule = |header: &str, regex: &str| {
        json!({
            "header": header,
            "on_header_present": {
                "metadata_namespace": "envoy.lb",
                "key": "node",
                "regex_value_rewrite": {"pattern": {"regex": regex}, "substitution": "\\1"},
            },
        })
    };
    json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
        "request_rules": [
            rule(":authority", r"^(?:[0-9]{1,5}-)?([a-z0-9]{5})[a-z0-9]{20}\..*$"),
            rule("x-session-id", r"^([a-z0-9]{5})[a-z0-9]{20}$"),
        ],
    })
}

/// What Envoy says by itself, to each caller in its own tongue. The first that fits is taken.
fn local_replies(domain: &str) -> Value {
    let gone = ["UF", "UH", "UC", "UT", "URX", "LR", "UR", "NC"];
    let overloaded = Failure::unavailable(
        Reason::new("EDGE_OVERLOADED"),
        "too many requests at once; try again",
    );
    let node = Failure::unavailable(
        Reason::NODE_UNREACHABLE,
        "the node that hosts this session does not answer; try again",
    );
    let service = Failure::unavailable(
        Reason::SERVICE_UNAVAILABLE,
        "the API does not answer; try again",
    );
    let of_domain = format!(r"(?i).*\.{}(:[0-9]+)?", domain.replace('.', r"\."));
    let for_a_session = json!({"or_filter": {"filters": [
        {"header_filter": {"header": {"name": "x-session-id", "present_match": true}}},
        request_has(":authority", json!({"safe_regex": {"regex": of_domain}})),
    ]}});
    let mappers: Vec<Value> = [
        (vec![flagged(&["UO"])], overloaded),
        (vec![flagged(&gone), for_a_session], node),
        (vec![flagged(&gone)], service),
    ]
    .into_iter()
    .flat_map(|(filters, failure)| {
        [
            grpc_reply(&filters, &failure),
            http_reply(&filters, &failure),
        ]
    })
    .collect();
    json!({"mappers": mappers})
}

/// Envoy makes the status from the 503 (UNAVAILABLE) and the message from the body; the details are a header.
fn grpc_reply(filters: &[Value], failure: &Failure) -> Value {
    let is_grpc = request_has("content-type", json!({"prefix": "application/grpc"}));
    let details = BASE64_NOPAD.encode(failure.clone().into_status().details());
    json!({
        "filter": all_of(&[filters, &[is_grpc]].concat()),
        "status_code": 503,
        "headers_to_add": [header("grpc-status-details-bin", &details)],
        "body_format_override": {"text_format_source": {"inline_string": failure.message()}},
    })
}

fn http_reply(filters: &[Value], failure: &Failure) -> Value {
    json!({
        "filter": all_of(filters),
        "status_code": 503,
        "headers_to_add": [header("retry-after", "1")],
        "body_format_override": {"json_format": {
            "reason": failure.reason().as_str(),
            "message": failure.message(),
            "requestId": "%REQ(x-request-id)%",
        }},
    })
}

/// Envoy wants at least two filters in an `and_filter`.
fn all_of(filters: &[Value]) -> Value {
    match filters {
        [only] => only.clone(),
        several => json!({"and_filter": {"filters": several}}),
    }
}

fn request_has(name: &str, value: Value) -> Value {
    json!({"header_filter": {"header": {"name": name, "string_match": value}}})
}

fn flagged(flags: &[&str]) -> Value {
    json!({"response_flag_filter": {"flags": flags}})
}

fn header(key: &str, value: &str) -> Value {
    json!({"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"})
}

/// No authority and no path: both may hold a session ID.
fn access_log() -> Value {
    json!({
        "name": "envoy.access_loggers.stdout",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {"json_format": {
                "time": "%START_TIME%",
                "route": "%ROUTE_NAME%",
                "method": "%REQ(:METHOD)%",
                "protocol": "%PROTOCOL%",
                "status": "%RESPONSE_CODE%",
                "grpc": "%GRPC_STATUS%",
                "flags": "%RESPONSE_FLAGS%",
                "milliseconds": "%DURATION%",
                "received": "%BYTES_RECEIVED%",
                "sent": "%BYTES_SENT%",
                "upstream": "%UPSTREAM_HOST%",
                "requestId": "%REQ(X-REQUEST-ID)%",
            }},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bootstrap() -> Bootstrap {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Bootstrap {
            node_id: "edge-1".into(),
            edge: at(10080),
            admin: at(9901),
            control: at(10103),
            gateways: vec![at(10100)],
            domain: "sandmesh.localhost".into(),
            otlp: None,
            max_connections: 50_000,
        }
    }

    #[test]
    fn no_user_sets_internal_headers_and_no_log_shows_ids() {
        let rendered = bootstrap().render(&MeshToken::from_bytes([1; 32]));
        let text = rendered.to_string();
        for name in INTERNAL_HEADERS {
            assert!(
                text.contains(&format!("{{\"remove\":\"{name}\"}}")),
                "{name}"
            );
        }
        let log = access_log().to_string();
        assert!(!log.contains("AUTHORITY") && !log.contains(":PATH"));
    }

    #[test]
    fn envoys_own_refusals_carry_details() {
        let replies = local_replies("sandmesh.localhost");
        let mappers = replies["mappers"].as_array().unwrap();
        let reasons = mappers.iter().filter_map(|mapper| {
            let header = &mapper["headers_to_add"][0]["header"];
            let details = header["value"].as_str()?;
            (header["key"] == "grpc-status-details-bin").then(|| {
                let details = BASE64_NOPAD.decode(details.as_bytes()).unwrap();
                let code = tonic::Code::Unavailable;
                let status = tonic::Status::with_details(code, "", details.into());
                service_kit::errors::reason_of(&status).unwrap()
            })
        });
        assert_eq!(
            reasons.collect::<Vec<_>>(),
            ["EDGE_OVERLOADED", "NODE_UNREACHABLE", "SERVICE_UNAVAILABLE"]
        );
    }

    #[test]
    fn no_route_has_the_default_timeout() {
        let routes = bootstrap().routes();
        for host in routes["virtual_hosts"].as_array().unwrap() {
            for route in host["routes"].as_array().unwrap() {
                assert_eq!(route["route"]["timeout"], "0s", "{route}");
            }
        }
    }
}
