# A fleet's nodes on OpenStack. Beside this file, for each node:
#
#   bakehouse build && qemu-img convert -O qcow2 build/app/acme-app_1.raw app.qcow2    # each group
#   bakehouse ticket app-1 -o app-1.ticket                                             # each node
#
# `terraform validate` reads it without an account. A ticket is a secret until its node has joined,
# and Terraform's state keeps it: keep the state where secrets are kept, or let tickets expire.

terraform {
  required_providers {
    openstack = {
      source  = "terraform-provider-openstack/openstack"
      version = "~> 3.0"
    }
  }
}

variable "nodes" {
  description = "Node → its group and flavour. As many as fleet.toml has."
  type        = map(object({ group = string, flavor = string }))
  default = {
    "hub-1"     = { group = "hub", flavor = "m1.small" }
    "hub-2"     = { group = "hub", flavor = "m1.small" }
    "hub-3"     = { group = "hub", flavor = "m1.small" }
    "db-1"      = { group = "db", flavor = "m1.large" }
    "db-2"      = { group = "db", flavor = "m1.large" }
    "app-1"     = { group = "app", flavor = "m1.large" }
    "app-2"     = { group = "app", flavor = "m1.large" }
    "monitor-1" = { group = "monitor", flavor = "m1.medium" }
  }
}

variable "network" {
  description = "Name of a network on which nodes reach the hubs' endpoints."
  type        = string
}

resource "openstack_images_image_v2" "group" {
  for_each         = toset([for node in var.nodes : node.group])
  name             = "bakehouse-${each.key}"
  local_file_path  = "${path.module}/${each.key}.qcow2"
  container_format = "bare"
  disk_format      = "qcow2"
  properties = {
    hw_firmware_type = "uefi"
    hw_machine_type  = "q35"
    hw_rng_model     = "virtio"
  }
}

# A node of its own on each physical host, as far as there are hosts.
resource "openstack_compute_servergroup_v2" "apart" {
  name     = "bakehouse"
  policies = ["soft-anti-affinity"]
}

resource "openstack_compute_instance_v2" "node" {
  for_each    = var.nodes
  name        = each.key
  image_id    = openstack_images_image_v2.group[each.value.group].id
  flavor_name = each.value.flavor
  # The ticket: nodes read their user data from the config drive, and no metadata service.
  user_data    = file("${path.module}/${each.key}.ticket")
  config_drive = true
  network {
    name = var.network
  }
  scheduler_hints {
    group = openstack_compute_servergroup_v2.apart.id
  }
  lifecycle {
    # Nodes update themselves. A new ticket for a node that has joined is none of its business.
    ignore_changes = [image_id, user_data]
  }
}
