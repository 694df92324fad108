-- Times are microseconds since 1970. Team '' holds the templates every team may use.

create table template_versions (
    team text not null,
    name text not null,
    version bigint not null,
    create_time bigint not null,
    -- Encoded sandmesh.template.v1.Template, without its tags.
    spec bytea not null,
    primary key (team, name, version)
);

create table template_tags (
    team text not null,
    name text not null,
    tag text not null,
    version bigint not null,
    primary key (team, name, tag),
    foreign key (team, name, version) references template_versions on delete cascade
);

create table builds (
    build_id text primary key,
    -- Who asked; the template may be another's: the shared ones are ''.
    team text not null,
    template_team text not null,
    name text not null,
    request_id text,
    state smallint not null,
    -- Encoded sandmesh.template.v1.BuildTemplateRequest.
    request bytea not null,
    create_time bigint not null,
    end_time bigint,
    version bigint,
    error_reason text not null default '',
    error_message text not null default '',
    -- Until when the replica that builds has it.
    lease_until bigint
);

create unique index builds_request on builds (team, request_id) where request_id is not null;
-- States 1 and 2 are queued and running.
create index builds_waiting on builds (create_time) where state < 3;

create table build_logs (
    build_id text not null references builds on delete cascade,
    number bigserial,
    time bigint not null,
    message text not null,
    primary key (build_id, number)
);
