-- Pause, resume, fork, checkpoints and egress.

alter table sessions
    add column parent_session_id text,
    -- While Paused: bytes on its node's disk.
    add column stored_bytes bigint not null default 0,
    -- Encoded sandmesh.session.v1.Egress.
    add column egress bytea not null default '',
    -- Bytes per second; 0 is the node's limit.
    add column egress_rate bigint not null default 0,
    add column ingress_rate bigint not null default 0,
    -- Microseconds of its time to live that are left; set while it does not count down: from Pausing until Running again.
    add column time_left bigint,
    -- The version with which it entered its state: an answer of a node to an earlier move changes nothing any more.
    add column state_version bigint not null default 0,
    -- When it entered its state.
    add column state_time bigint not null default 0,
    -- While Resuming: the checkpoint it goes back to, and the state it came from.
    add column rollback_to text,
    add column rollback_from smallint,
    -- Its settings are not known to have reached its node; from this time on any replica may tell it again.
    add column push_due bigint;

update sessions set state_version = version, state_time = coalesce(start_time, create_time);

create index sessions_push_due on sessions (push_due) where push_due is not null;

-- What was answered to a fork with a request ID.
create table forks (
    team text not null,
    request_id text not null,
    parent_session_id text not null,
    children text[] not null,
    -- Microseconds; null until the node has answered.
    parent_stop_time bigint,
    create_time bigint not null,
    primary key (team, request_id)
);
create index forks_created on forks (create_time);

create table checkpoints (
    checkpoint_id text primary key,
    session_id text not null references sessions on delete cascade,
    team text not null,
    -- Null once the checkpoint is given up, so that another try with the same ID is a new one.
    request_id text,
    name text not null,
    -- 0 being made, 1 kept, 2 being removed. All but kept have a lease, and are removed once it is over.
    state smallint not null,
    create_time bigint not null,
    stored_bytes bigint not null default 0,
    -- Microseconds.
    stop_time bigint not null default 0,
    lease_until bigint
);
create unique index checkpoints_request on checkpoints (team, request_id) where request_id is not null;
create index checkpoints_session on checkpoints (session_id, create_time, checkpoint_id);
create index checkpoints_lease on checkpoints (lease_until) where lease_until is not null;

-- An operator wants it to take no new sessions, whatever its heartbeats say.
alter table nodes add column drain boolean not null default false;
