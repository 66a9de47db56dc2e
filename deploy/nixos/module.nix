# SPDX-License-Identifier: Apache-2.0
# A sketch for NixOS, evaluated with the module system but never built: imports = [ ./module.nix ];
#   services.lotusguard = { enable = true; package = …; environmentFile = "/run/secrets/lotusguard.env"; };
# The package is a Python environment with lotusguard in it. lk-jwt-service must listen on 127.0.0.1:8071.
{ config, lib, ... }:
let
  cfg = config.services.lotusguard;
  listen = lib.concatStringsSep " " [
    "--listen systemd:domain=INET:index=0"
    "--listen systemd:domain=INET6:index=1"
  ];
in
{
  options.services.lotusguard = {
    enable = lib.mkEnableOption "lotusguard, which enforces Matrix rooms' call policies in front of lk-jwt-service";
    package = lib.mkOption {
      type = lib.types.package;
      description = "A Python environment with lotusguard.";
    };
    environmentFile = lib.mkOption {
      type = lib.types.str;
      description = "A file of NAME=value lines with the secrets, as deploy/systemd/lotusguard.env.example.";
    };
    settings = lib.mkOption {
      type = lib.types.attrsOf lib.types.str;
      default = { };
      example = { GUARD_LOG_FORMAT = "json"; };
      description = "Further settings (docs/configuration.md). They are readable by everybody: no secrets.";
    };
  };

  config = lib.mkIf cfg.enable {
    systemd.sockets.lotusguard = {
      description = "lotusguard's public port";
      wantedBy = [ "sockets.target" ];
      listenStreams = [
        "127.0.0.1:8070"
        "[::1]:8070"
      ];
      socketConfig = {
        BindIPv6Only = "ipv6-only";
        Backlog = "4096";
        NoDelay = "yes";
      };
    };

    systemd.services.lotusguard = {
      description = "lotusguard: Matrix rooms' call policies in front of lk-jwt-service";
      wants = [ "network-online.target" ];
      requires = [ "lotusguard.socket" ];
      after = [
        "network-online.target"
        "lotusguard.socket"
      ];
      wantedBy = [ "multi-user.target" ];
      environment = cfg.settings;
      unitConfig.StartLimitIntervalSec = "0";
      # As deploy/systemd/lotusguard.service, which has the reasons.
      serviceConfig = {
        ExecStart = "${cfg.package}/bin/twistd -n --pidfile= lotusguard ${listen}";
        ExecReload = "/bin/sh -c 'kill -HUP $MAINPID'";
        ExecStopPost = "+/bin/sh -c '[ \"$EXIT_STATUS\" != 78 ] || exec /run/current-system/sw/bin/systemctl --no-block stop lotusguard.socket'";
        EnvironmentFile = cfg.environmentFile;
        Type = "notify";
        NotifyAccess = "main";
        SyslogIdentifier = "lotusguard";
        WatchdogSec = "30";
        TimeoutStartSec = "30";
        TimeoutStopSec = "30";
        Restart = "always";
        RestartSec = "1";
        RestartPreventExitStatus = "78";
        LimitNOFILE = "65536";
        DynamicUser = "yes";
        StateDirectory = "lotusguard";
        StateDirectoryMode = "0700";
        UMask = "0077";
        NoNewPrivileges = "yes";
        CapabilityBoundingSet = "";
        AmbientCapabilities = "";
        ProtectSystem = "strict";
        ProtectHome = "yes";
        PrivateTmp = "yes";
        PrivateDevices = "yes";
        PrivateUsers = "yes";
        ProtectHostname = "yes";
        ProtectClock = "yes";
        ProtectKernelTunables = "yes";
        ProtectKernelModules = "yes";
        ProtectKernelLogs = "yes";
        ProtectControlGroups = "yes";
        ProtectProc = "invisible";
        RestrictAddressFamilies = "AF_UNIX AF_INET AF_INET6";
        RestrictNamespaces = "yes";
        RestrictRealtime = "yes";
        RestrictSUIDSGID = "yes";
        LockPersonality = "yes";
        RemoveIPC = "yes";
        KeyringMode = "private";
        SystemCallArchitectures = "native";
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = [
          "@system-service"
          "~@privileged @resources"
        ];
      };
    };
  };
}
