-- What steps of builds have come to, by all they depend on. Of a team: nobody learns what another one's step has made.
create table build_steps (
    team text not null,
    key bytea not null,
    -- Encoded sandmesh.template.v1.Template of which only the layers are set.
    layers bytea not null,
    create_time bigint not null,
    primary key (team, key)
);
