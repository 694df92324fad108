-- Kernels that templates can be built with, besides the deployment's own.
create table kernels (
    name text primary key,
    version text not null,
    arch text not null,
    kernel_digest text not null,
    kernel_size bigint not null,
    modules_digest text not null,
    modules_size bigint not null,
    create_time bigint not null
);
