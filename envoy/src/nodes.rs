//! Nodes from the registry as Envoy's endpoints. The building is pure: the same nodes give the same resource.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::{
    core::v3::{Address, HealthStatus, Locality, Metadata, SocketAddress, address, socket_address},
    endpoint::v3::{
        ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
        lb_endpoint::HostIdentifier,
    },
};
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
use proto::node::v1::{Node, NodeState};

/// Name of the cluster of all nodes.
pub const CLUSTER: &str = "nodes";

/// The endpoints of all nodes that are not dead, ordered by ID.
///
/// A silent node stays: its sandboxes may well answer. Nodes whose address is no socket address are left out.
pub fn endpoints(nodes: &[Node]) -> ClusterLoadAssignment {
    let living: BTreeMap<&str, &Node> = nodes
        .iter()
        .filter(|node| node.state() != NodeState::Dead)
        .map(|node| (node.node_id.as_str(), node))
        .collect();
    ClusterLoadAssignment {
        cluster_name: CLUSTER.into(),
        endpoints: vec![LocalityLbEndpoints {
            locality: Some(Locality::default()),
            lb_endpoints: living.into_values().filter_map(endpoint).collect(),
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    }
}

fn endpoint(node: &Node) -> Option<LbEndpoint> {
    let (host, port) = node.ingress_address.rsplit_once(':')?;
    let port: u32 = port
        .parse()
        .ok()
        .filter(|port| (1..=65535).contains(port))?;
    let socket = SocketAddress {
        address: host.trim_matches(['[', ']']).to_owned(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(port)),
        ..SocketAddress::default()
    };
    let tag = Struct {
        // No other key may stand here, or the subset of a tag would not match it.
        fields: [(
            "node".to_owned(),
            Value {
                kind: Some(Kind::StringValue(node.home_tag.clone())),
            },
        )]
        .into(),
    };
    Some(LbEndpoint {
        health_status: HealthStatus::Healthy.into(),
        metadata: Some(Metadata {
            filter_metadata: [("envoy.lb".to_owned(), tag)].into(),
            ..Metadata::default()
        }),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(Address {
                address: Some(address::Address::SocketAddress(socket)),
            }),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str, address: &str, state: NodeState) -> Node {
        Node {
            node_id: id.into(),
            home_tag: format!("tag{id}"),
            ingress_address: address.into(),
            state: state.into(),
            ..Node::default()
        }
    }

    #[test]
    fn silent_nodes_stay_dead_ones_go_and_order_does_not_matter() {
        let nodes = [
            node("b", "10.0.0.2:80", NodeState::Silent),
            node("a", "10.0.0.1:80", NodeState::Ready),
            node("c", "10.0.0.3:80", NodeState::Dead),
            node("d", "nonsense", NodeState::Ready),
        ];
        let mut reversed = nodes.to_vec();
        reversed.reverse();
        let built = endpoints(&nodes);
        assert_eq!(built, endpoints(&reversed));
        assert_eq!(built.endpoints[0].lb_endpoints.len(), 2);
    }
}
