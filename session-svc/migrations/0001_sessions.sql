-- Times are microseconds since 1970, from the clock of the service that writes them.

create table nodes (
    node_id text primary key,
    home_tag text not null unique,
    incarnation text not null,
    ingress_address text not null,
    internal_address text not null,
    draining boolean not null default false,
    dead boolean not null default false,
    last_heartbeat bigint not null,
    -- Encoded sandmesh.node.v1.Node as the node described itself when it registered.
    description bytea not null,
    -- Encoded sandmesh.node.v1.Capacity: what its last heartbeat said is given out.
    used bytea not null
);

create table sessions (
    session_id text primary key,
    -- IDs it had before it first ran, while nodes turned it down; their events go when it goes.
    former_ids text[] not null default '{}',
    team text not null,
    -- Null again once the create has failed, so that another try with the same ID is a new one.
    request_id text,
    state smallint not null,
    node_id text not null,
    template text not null,
    template_version text not null,
    -- Encoded sandmesh.template.v1.Template, so that a start can be repeated as it was.
    template_spec bytea not null,
    vcpus integer not null,
    memory_bytes bigint not null,
    disk_bytes bigint not null,
    port_access smallint not null,
    internet_access boolean not null,
    metadata jsonb not null,
    env jsonb not null,
    on_timeout smallint not null,
    wake_on_request boolean not null,
    create_time bigint not null,
    start_time bigint,
    timeout bigint not null,
    deadline bigint not null,
    end_time bigint,
    end_reason text,
    end_message text,
    -- Until when the replica that moves the session on has it; after that any other may.
    lease_until bigint,
    version bigint not null
);

create unique index sessions_request on sessions (team, request_id) where request_id is not null;
create index sessions_newest on sessions (team, create_time desc, session_id desc);
-- States 8, 9 and 10 are final.
create index sessions_deadline on sessions (deadline) where state < 8;
create index sessions_lease on sessions (lease_until) where lease_until is not null;
create index sessions_node on sessions (node_id) where state < 8;
create index sessions_ended on sessions (end_time) where state >= 8;

create table session_events (
    -- Order of the change feed: (xid, seq), read only below the oldest transaction still running, so that nothing is ever
    -- committed behind a reader.
    xid xid8 not null default pg_current_xact_id(),
    seq bigserial not null,
    session_id text not null,
    team text not null,
    number bigint not null,
    type text not null,
    state smallint not null,
    time bigint not null,
    reason text not null,
    message text not null,
    actor text not null,
    -- Encoded sandmesh.session.v1.Session after the event, without its access token.
    session bytea not null,
    primary key (xid, seq)
);

create index session_events_session on session_events (session_id, number);

-- Up to where the feed is not whole any more: the newest event ever purged. One row, written only by purges.
create table feed (
    only_row boolean primary key default true check (only_row),
    floor_xid bigint not null,
    floor_seq bigint not null
);
insert into feed (floor_xid, floor_seq) values (0, 0);
