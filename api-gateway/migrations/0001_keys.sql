-- Times are microseconds since 1970.

create table teams (
    team text primary key,
    create_time bigint not null
);

create table api_keys (
    key_id text primary key,
    team text not null references teams,
    -- SHA-256 of the whole key; the key itself is stored nowhere.
    secret_sha256 bytea not null,
    description text not null,
    operator boolean not null default false,
    create_time bigint not null,
    revoke_time bigint
);

create index api_keys_newest on api_keys (create_time desc, key_id desc);
