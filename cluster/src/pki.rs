//! Certificates, tokens and kubeconfigs of a cluster.
//!
//! People and components have static tokens. Only the API server has certificates: for its clients,
//! and as a client of kubelets.

use std::fmt::Write as _;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::addresses::{
    API_PORT, API_SERVER, API_SERVER_IPV6, KUBERNETES_SERVICE, KUBERNETES_SERVICE_IPV6, NodeNumber,
};
use crate::process::Cmd;
use crate::state::State;

/// The arguments of openssl for a new key.
const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";

/// Makes everything that is missing.
pub(crate) fn ensure(state: &State, nodes: u8) -> Result<()> {
    if state.path("pki/complete").exists() {
        return Ok(());
    }
    let directory = state.path("pki");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    certificates(state, &directory).context("cannot make the cluster's certificates")?;
    tokens(state, nodes)?;
    state.write("pki/complete", "")
}

fn certificates(state: &State, directory: &Path) -> Result<()> {
    let openssl = |args: &str| {
        Cmd::new("openssl").dir(directory).args(args.split_whitespace()).answer().map(drop)
    };
    openssl(&format!(
        "req -x509 {KEY} -days 3650 -subj /CN=sluice-cluster -keyout ca.key -out ca.crt"
    ))?;
    let names = format!(
        "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,\
         DNS:localhost,IP:127.0.0.1,IP:{API_SERVER},IP:{API_SERVER_IPV6},IP:{KUBERNETES_SERVICE},\
         IP:{KUBERNETES_SERVICE_IPV6}"
    );
    for (name, subject, names) in [
        ("apiserver", "/CN=kube-apiserver", names.as_str()),
        ("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client", "DNS:apiserver"),
    ] {
        state.write(
            format!("pki/{name}.ext"),
            &format!("subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n"),
        )?;
        openssl(&format!("req {KEY} -subj {subject} -keyout {name}.key -out {name}.csr"))?;
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out {name}.crt -extfile {name}.ext"
        ))?;
    }
    // Service account tokens are signed with RSA, as everywhere.
    openssl("genrsa -out service-accounts.key 2048")
}

fn tokens(state: &State, nodes: u8) -> Result<()> {
    let mut lines = String::new();
    let mut user = |file: &Path, name: &str, groups: &str| -> Result<()> {
        let token = random_token()?;
        // Writing to a String cannot fail.
        let _ = writeln!(lines, "{token},{name},{name},\"{groups}\"");
        let authority = state.path("pki/ca.crt");
        state.write(
            file,
            &format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: sluice\n\
                 clusters: [{{name: sluice, cluster: {{server: 'https://{API_SERVER}:{API_PORT}', certificate-authority-data: {}}}}}]\n\
                 users: [{{name: {name}, user: {{token: {token}}}}}]\n\
                 contexts: [{{name: sluice, context: {{cluster: sluice, user: {name}}}}}]\n",
                base64(&fs::read(&authority).with_context(|| format!("cannot read {}", authority.display()))?)
            ),
        )
    };
    user(&state.kubeconfig(), "admin", "system:masters")?;
    for node in NodeNumber::all(nodes) {
        let name = node.name();
        user(
            Path::new(&format!("nodes/{name}/kubeconfig")),
            &format!("system:node:{name}"),
            "system:nodes",
        )?;
    }
    state.write("pki/tokens.csv", &lines)
}

fn random_token() -> Result<String> {
    let mut bytes = [0_u8; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}")))
}

/// Encodes as RFC 4648, section 4, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0_u32, |group, byte| group << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let digit = (group >> (18 - 6 * place)) & 63;
            text.push(if place > chunk.len() { '=' } else { char::from(ALPHABET[digit as usize]) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_rfc() {
        let vectors = ["", "f", "fo", "foo", "foob"].map(|text| base64(text.as_bytes()));
        assert_eq!(vectors, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg=="]);
    }
}
